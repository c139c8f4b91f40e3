"""ListOps by LRA's grammar: nested minimum, maximum, median and sum mod 10 of digits."""

from random import Random

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
OPERATOR_SHARE = 0.25


class _TooLong(Exception):
    pass


def generate_rows(
    num_rows: int, rng: Random, min_length: int, max_length: int, max_depth: int, max_args: int
) -> list[tuple[str, int]]:
    """Different expressions with their values, min_length < number of symbols < max_length.

    Parentheses are written but are no symbols. LRA's own limits are 500, 2000, depth 10, 10 arguments.
    """
    rows: dict[str, int] = {}
    failures = 0
    while len(rows) < num_rows:
        budget = [max_length - 1]
        try:
            source, value = _tree(1, rng, budget, max_depth, max_args)
        except _TooLong:
            source = None
        if source is None or max_length - 1 - budget[0] <= min_length or source in rows:
            failures += 1
            if failures > 10_000 * (len(rows) + 1):
                raise ValueError(
                    f"listops: only {len(rows)} of {num_rows} different expressions were found "
                    f"with {min_length} < length < {max_length}, depth {max_depth}, {max_args} arguments"
                )
            continue
        rows[source] = value
    return list(rows.items())


def _tree(
    depth: int, rng: Random, budget: list[int], max_depth: int, max_args: int
) -> tuple[str, int]:
    """One node as text with its value; takes its symbols from budget[0]."""
    if depth == max_depth or rng.random() > OPERATOR_SHARE:
        budget[0] -= 1
        if budget[0] < 0:
            raise _TooLong
        digit = int(rng.random() * 10)
        return str(digit), digit
    budget[0] -= 2
    operator = OPERATORS[int(rng.random() * 4)]
    num_args = 2 + int(rng.random() * (max_args - 1))
    source, values = operator, []
    for _ in range(num_args):
        argument, value = _tree(depth + 1, rng, budget, max_depth, max_args)
        source = f"( {source} {argument} )"
        values.append(value)
    return f"( {source} ] )", apply_operator(operator, values)


def apply_operator(operator: str, values: list[int]) -> int:
    """The value of an operator: minimum, maximum, floor of the median, or sum mod 10."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered = sorted(values)
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) // 2
