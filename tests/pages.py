"""The pages of the documentation as the tests read them: fenced blocks, lines of shell, links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("sh", "console", "ini")
_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
_CONTROL = re.compile(r"[|&;<>()]+")


@dataclass(frozen=True)
class Block:
    """A fenced block. Words behind the language say how it is tested.

    The `python` blocks of a page run one after the other; of `sh` blocks only the options are parsed. `python no-run`
    needs a network, a server or hours: it is compiled. `sh run` really runs, in its place among the Python blocks.
    `nightly` leaves either to `make test-nightly`.
    """

    language: str
    words: frozenset[str]
    text: str
    line: int

    @property
    def runs(self) -> bool:
        return "no-run" not in self.words and (self.language == "python" or "run" in self.words)


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page, all of them or those in some languages."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        if not languages or language in languages:
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(language, frozenset(words), match["text"], line))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def shell_lines(text: str) -> list[list[str]]:
    """The words of each line of shell; continued lines are joined, comments and the output of a console left out."""
    console = any(line.startswith("$ ") for line in text.splitlines())
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        if console and not line.startswith("$ "):
            continue
        lexer = shlex.shlex(line.removeprefix("$ ").removeprefix("ExecStart="), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation over several lines
            continue
        if words:
            lines.append(words)
    return lines


def programs(text: str, name: str) -> list[list[str]]:
    """The arguments of each call of a program in a shell block, without redirections and what follows a pipe."""
    found = []
    for words in shell_lines(text):
        for place, word in enumerate(words):
            before = words[place - 1] if place else ""
            called = place == 0 or _CONTROL.fullmatch(before) or "=" in before or before in ("-m", "IMAGE", "$")
            called = called or before.replace("-", "").replace(",", "").isdigit()  # taskset -c 0-3
            if Path(word).name == name and called and "=" not in word:
                arguments = []
                for argument in words[place + 1 :]:
                    if _CONTROL.fullmatch(argument):
                        break
                    arguments.append(argument)
                found.append(arguments)
    return found


def links(page: Path) -> list[str]:
    """The targets of the links and images of a page that lie in the repository."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?)\s*$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = 0
        while (unique := slug if number == 0 else f"{slug}-{number}") in found:
            number += 1
        found.add(unique)
    return found
