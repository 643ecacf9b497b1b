"""A page that classifies digits in the browser: trained, exported, its files with their sizes. Needs npm.

`python examples/in_the_browser.py FOLDER` keeps the page in a new folder, for
`python -m http.server --directory FOLDER`.
"""

import sys
import tempfile
from pathlib import Path

import coatnet
from coatnet.export import export_bundle

recipe = coatnet.Recipe(data="digits", model="coatnet-femto-16", epochs=1)
with tempfile.TemporaryDirectory() as folder:
    coatnet.train(recipe, f"{folder}/run")
    page = Path(sys.argv[1] if len(sys.argv) > 1 else f"{folder}/page")
    exported = export_bundle(coatnet.load(f"{folder}/run/bundle"), "web", page, fp16=True)
    for path in sorted(page.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:12,}  {path.relative_to(page)}")
    print(f"probabilities within {exported.parity.probability_difference:.0e} of the bundle's")
