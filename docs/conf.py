"""Configuration of the documentation site; `make docs` builds it into build/docs, without a network."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "coatnet"
author = "The coatnet maintainers"
copyright = "The coatnet maintainers, Apache-2.0"
version = release = installed_version("coatnet")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "coatnet_reference"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["results/fashion-mnist/*.json"]
templates_path = []
language = "en"

# Headings get the anchors that GitHub gives them, so that a link works in both places; a wrong one is a warning.
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = []
smartquotes_action = "qe"  # quotes and ellipses; dashes would change the options of a command

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = f"coatnet {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_nav_level": 2,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 7,
}
