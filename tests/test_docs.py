"""Docs say what the code does: the reference is generated, hooks and files are named, links lead somewhere."""

import importlib.util
import inspect
import re
from pathlib import Path

from mergekit_vl.recipes.loading import installed_recipes
from mergekit_vl.registry import hookspecs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "plugins").glob("*/README.md"))]


def test_the_reference_is_what_the_code_declares():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text() == module.reference(), "run python scripts/make_reference.py"


def test_the_page_of_inputs_is_what_the_code_lists():
    spec = importlib.util.spec_from_file_location("make_inputs", ROOT / "scripts" / "make_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text() == module.page(), "run python scripts/make_inputs.py"


def test_every_hook_is_documented_with_its_arguments():
    page = (ROOT / "docs" / "plugins.md").read_text()
    hooks = {n: f for n, f in vars(hookspecs).items() if n.startswith("register_") and callable(f)}
    assert len(hooks) == 7
    for name, hook in hooks.items():
        assert f"`{name}({', '.join(inspect.signature(hook).parameters)})`" in page


def test_every_link_to_a_file_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_link_to_a_section_leads_to_one():
    links = [
        (page, page.parent / target if target else page, anchor)
        for page in PAGES
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    ]
    assert len(links) > 10
    for page, target, anchor in links:
        assert anchor in sections(target), f"{page.name}: {target.name}#{anchor}"


def sections(page):
    """The anchors of a page's headings, as GitHub makes them; headings in code blocks are none."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    seen: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if anchor in seen else anchor)
        seen[anchor] = seen.get(anchor, 0) + 1
    return anchors


def test_every_recipe_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for name in installed_recipes())
