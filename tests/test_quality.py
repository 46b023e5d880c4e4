"""The docstring check finds what it is there to find, and nothing in code that is right."""

import ast

import pytest
from docstrings import check_class, check_function, check_types, public_names, thin_tests

RIGHT = '''
def keep(scores: Tensor, p: float) -> Tensor:
    """Keep the blocks that matter.

    Args:
        scores: ``(B, H, Nq, Nk)``, any float dtype.
        p: Mass to reach, in (0, 1].

    Returns:
        ``(B, H, Nq, Nk)`` bool.
    """
'''
FUNCTIONS = {
    "right": (RIGHT, []),
    "no section": (RIGHT.replace("    Args:\n", "    Which:\n"), ["no Args: section for scores, p"]),
    "missing": (RIGHT.replace("        p: Mass to reach, in (0, 1].\n", ""), ["missing under Args: p"]),
    "renamed": (
        RIGHT.replace("        p: Mass", "        q: Mass"),
        ["missing under Args: p", "not in the signature: q"],
    ),
    "order": (RIGHT.replace("scores: Tensor, p: float", "p: float, scores: Tensor"), ["another order"]),
    "shape of an argument": (RIGHT.replace("``(B, H, Nq, Nk)``, any", "Any"), ["tensor scores"]),
    "shape of the result": (RIGHT.replace("``(B, H, Nq, Nk)`` bool", "The blocks"), ["tensor it returns"]),
    "starred": ('def f(*names: str, **more: int) -> None:\n    """Do it."""', ["section for *names, **more"]),
    "callable": ('def f() -> Callable[[Tensor], Tensor]:\n    """Do it."""', []),
}
CLASSES = {
    "right": ('@dataclass\nclass A:\n    """Be.\n\n    Args:\n        x: It.\n    """\n\n    x: int', []),
    "field": ('@dataclass\nclass A:\n    """Be."""\n\n    x: int\n    _y: int\n    z: ClassVar[int] = 0', ["for x"]),
    "init": ('class A:\n    """Be."""\n\n    def __init__(self, x: int) -> None:\n        self.x = x', ["for x"]),
    "subclass": ('@dataclass\nclass A(B):\n    """Be.\n\n    Args:\n        y: Of B.\n    """', []),
}


def check(faults: list[tuple[int, str]], expected: list[str]) -> None:
    assert len(faults) == len(expected), faults
    for (_, fault), text in zip(faults, expected, strict=True):
        assert text in fault


@pytest.mark.parametrize("case", FUNCTIONS)
def test_function(case):
    source, expected = FUNCTIONS[case]
    check(list(check_function(ast.parse(source).body[0], "f")), expected)


@pytest.mark.parametrize("case", CLASSES)
def test_class(case):
    source, expected = CLASSES[case]
    check(list(check_class(ast.parse(source).body[0])), expected)


HEAD = "class Mine(BlockMethod):\n    '''Be.'''\n\n    def "
INHERITED = {
    "none": ("forward(self, q: Tensor) -> Tensor: ...", []),
    "one line": ("forward(self, q: Tensor) -> Tensor:\n        '''Go.'''", []),
    "own arguments": (
        "forward(self, q: Tensor) -> None:\n        '''Go.\n\n        Args:\n            p: It.\n        '''",
        ["missing under Args: q", "not in the signature: p", "tensor q"],
    ),
    "overrides none": ("go(self) -> None: ...", ["no docstring"]),
    "not from there": ("go(self, q: int) -> None:\n        '''Go.'''", ["no Args: section for q"]),
}


@pytest.mark.parametrize("case", INHERITED)
def test_overrides_inherit_docstrings(case):
    source, expected = INHERITED[case]
    check(list(public_names(ast.parse(HEAD + source), command_line=False)), expected)


def test_arguments_of_another_function():
    source = 'def f(capability: tuple[int, int], more: int) -> None:\n    """Do. Arguments as for ``choose_config``."""'
    check(list(check_function(ast.parse(source).body[0], "f")), ["missing under Args: more"])
    check(
        list(check_function(ast.parse(source.replace("choose_config", "no_such")).body[0], "f")), ["capability, more"]
    )


def test_functions_of_a_kernel_follow_the_contract():
    source = 'def check(q: Tensor) -> str | None:\n    """Say why."""'
    check(list(public_names(ast.parse(source), command_line=False, kernel=True)), [])
    check(list(public_names(ast.parse(source), command_line=False)), ["no Args: section for q", "tensor q"])


def test_types():
    source = "def f(a, b: int, *c, d=1, **e: int):\n    pass"
    check(list(check_types(ast.parse(source).body[0])), ["no type for a, *c, d", "no type for what it returns"])
    source = "@triton.jit\ndef f(a, BLOCK: tl.constexpr):\n    pass"
    check(list(check_types(ast.parse(source).body[0])), [])


def test_thin_tests():
    source = "def test_a():\n    assert f()\ndef test_b():\n    f()\ndef test_c():\n    with pytest.raises(E): f()"
    check(list(thin_tests(ast.parse(source))), ["test_b checks nothing"])
