"""The tests tested: wrong lines are noticed."""

import pytest

import mutation


def test_every_kind_of_mutant_is_drawn():
    """Statements removed, operators and constants changed, in all files."""
    drawn = mutation.draw(10**6, 0)
    assert {mutant[0] for mutant in drawn} == set(mutation.TARGETS)
    assert {"pass", "+", "-", "*", "/", "<=", "!=", "or", "True", "2"} <= {mutant[6] for mutant in drawn}
    assert mutation.draw(20, 1) == mutation.draw(20, 1) != mutation.draw(20, 2)


def test_a_mutant_is_python_and_differs_from_the_project_in_one_place():
    for mutant in mutation.draw(50, 0):
        source, wrong = (mutation.ROOT / mutant[0]).read_bytes(), mutation.broken(mutant)
        assert wrong != source and wrong.startswith(source[:mutant[4]]) and wrong.endswith(source[mutant[5]:])
        compile(wrong, mutant[0], "exec")


@pytest.mark.slow
def test_nineteen_of_twenty_wrong_lines_fail_a_test():
    """About an hour on 2 cores."""
    killed, survivors, _ = mutation.score(mutation.draw(300, 0))
    assert killed >= 0.95 * (killed + len(survivors)), survivors
