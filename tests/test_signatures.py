"""What a function may ask for: at most eight things, and a place or a lab instead of their parts."""

import ast
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
MOST, OF_A_PLACE = 8, 2
PLACE = {"model": "model", "hf_model": "model", "tokenizer": "tokenizer", "sae": "sae", "saes": "sae"} | {
    name: name for name in ("layer", "preset", "outlier")
}


def functions(tree: ast.Module) -> list[tuple[str, list[str]]]:
    """Return the public functions of a module and the methods of its public classes, each with its parameters."""
    found = [(node.name, node, False) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for group in (node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")):
        for node in (n for n in group.body if isinstance(n, ast.FunctionDef)):
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
            found.append((f"{group.name}.{node.name}", node, not static))
    return [(name, parameters(node)[bound:]) for name, node, bound in found if public(node.name)]


def public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def parameters(node: ast.FunctionDef) -> list[str]:
    """Return all parameters by name; what comes with one star or two counts as one."""
    given = node.args
    stars = [star for star in (given.vararg, given.kwarg) if star]
    return [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs, *stars)]


PUBLIC = {
    f"{'.'.join(path.relative_to(PROJECT).with_suffix('').parts)}.{name}": given
    for folder in ("steerkit", "recipes")
    for path in sorted((PROJECT / folder).rglob("*.py"))
    for name, given in functions(ast.parse(path.read_text()))
}


def test_a_function_asks_for_little():
    many = {name: given for name, given in PUBLIC.items() if len(given) > MOST}
    assert not many, f"expected at most {MOST} parameters"
    apart = {name: given for name, given in PUBLIC.items() if len({PLACE[arg] for arg in given if arg in PLACE}) > OF_A_PLACE}
    assert not apart, f"expected at most {OF_A_PLACE} of {sorted(set(PLACE.values()))}: take a Place (or a Lab) instead"


def test_the_rules_see_what_they_are_meant_to_see():
    source = (
        "def f(hf_model, tokenizer, *, saes): ...\ndef _g(a): ...\nclass C:\n    def m(self, a, *b, c=1, **d): ...\n"
        "    @staticmethod\n    def s(a): ...\n    def _n(self): ...\n    def __init__(self, x): ...\nclass _D:\n    def m(self): ...\n"
    )
    assert functions(ast.parse(source)) == [
        ("f", ["hf_model", "tokenizer", "saes"]),
        ("C.m", ["a", "c", "b", "d"]),
        ("C.s", ["a"]),
        ("C.__init__", ["x"]),
    ]
    assert {"steerkit.engine.generate.generate", "steerkit.engine.lab.Lab.tokens", "recipes.judges.main"} <= set(PUBLIC)
