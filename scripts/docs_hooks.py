"""What mkdocs does beside its own work (``hooks`` in mkdocs.yml): no public name without a docstring and a page.

The check reads source text alone, so that it needs neither PyTorch nor mkdocs; ``tests/test_docs.py`` makes it too. The
hooks also put pages of optimizers and of results into the menu, show Sphinx's roles in docstrings as plain names, and
write a list of files into every folder of raw files.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PUBLIC = ("hf_elra", "hf_elra.optim", "hf_elra.trainer", "hf_elra.control")
"""Packages whose ``__all__`` is public; a name may stand in several of them."""
MENUS = {"Optimizers": "optimizers", "Evidence": "results"}
"""Menus, and the folders whose pages they have, listed or not."""
_ROLE = re.compile(r":(?:class|meth|attr|func|data|mod):<code>(~?)([\w.]+)</code>")


def public_names() -> dict[str, str]:
    """Return all public names, and the first package that each can be imported from."""
    found: dict[str, str] = {}
    for package in reversed(PUBLIC):
        found |= dict.fromkeys(_value(_tree(package), "__all__"), package)
    return found


def pages() -> dict[str, str]:
    """Return the text of every page by its path below docs/, without the template of a page."""
    files = sorted(DOCS.rglob("*.md"))
    return {str(file.relative_to(DOCS)): file.read_text("utf-8") for file in files if not file.name.startswith("_")}


def missing() -> list[str]:
    """Return what is missing: one line for every public name without a page or without a docstring.

    A page shows a name with ``::: name``, or, if it is the page of an optimizer, by importing it in its example.
    """
    shown = set()
    for page, text in pages().items():
        shown |= {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", text, re.M)}
        if page.startswith("optimizers/"):
            imports = re.findall(r"^from hf_elra[\w.]* import (.*)$", text, re.M)
            shown |= {name.strip() for names in imports for name in names.split(",")}
    lines = []
    for name, package in sorted(public_names().items()):
        if name not in shown:
            lines.append(f"{package}.{name} has no page: write '::: {package}.{name}' into one of docs/*.md")
        if not has_docstring(package, name):
            lines.append(f"{package}.{name} has no docstring")
    return lines


def has_docstring(module: str, name: str) -> bool:
    """Return whether a class, function or value that a module has or imports is documented where it is defined."""
    body = _tree(module).body
    for number, node in enumerate(body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) is not None
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                after = body[number + 1] if number + 1 < len(body) else None
                return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    for origin, names in _imports(_tree(module)):
        if name in names:
            return has_docstring(origin, name)
    return False


def _imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module, [alias.name for alias in node.names]


def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text("utf-8"))


def _value(tree: ast.Module, name: str) -> Any:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    return []


# ---- hooks that mkdocs calls by name ----


def on_config(config: Any) -> None:
    """Fail before anything is built where a public name has no page; put pages that no menu lists into one."""
    if lines := missing():
        from mkdocs.exceptions import PluginError

        raise PluginError("\n".join(lines))
    for title, folder in MENUS.items():
        (menu,) = [entry[title] for entry in config["nav"] if title in entry]
        listed = {page for entry in menu for page in entry.values()}
        menu += [page for page in pages() if page.rpartition("/")[0] == folder and page not in listed]


def on_page_content(content: str, **given: Any) -> str:
    """Show the name alone in place of Sphinx's roles, which mkdocstrings leaves as they are."""
    return _ROLE.sub(lambda m: f"<code>{m[2].rpartition('.')[2] if m[1] else m[2]}</code>", content)


def on_post_build(config: Any) -> None:
    """Write a list of files into every folder of raw files, to which pages link."""
    site = Path(config["site_dir"])
    for folder in [site / "results", *sorted((site / "results").rglob("*/"))]:
        if (folder / "index.html").exists():
            continue
        names = sorted(f"{entry.name}/index.html" if entry.is_dir() else entry.name for entry in folder.iterdir())
        lines = "\n".join(f'<li><a href="{html.escape(name)}">{html.escape(name)}</a></li>' for name in names)
        title = html.escape(str(folder.relative_to(site)))
        text = f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1><ul>\n{lines}\n</ul>\n'
        (folder / "index.html").write_text(text, "utf-8")
