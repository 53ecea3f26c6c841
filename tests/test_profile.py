"""What a computation holds is known for any number of rows, and reads back as it was written."""

import json

import pytest

from posttrain.planning.profile import Profile, Segment


def segment(copies, *steps, highs=None):
    made = Segment(copies)
    for fixed, each in steps:
        made.add(fixed, each)
    if highs is not None:
        made.highs = highs
    return made


def rising():
    """10 bytes and 3 a row stay; then twice 5 a row come, 100 more for a moment, and 2 a row stay."""
    return Profile([segment(1, (10, 3)), segment(2, (100, 5), (-100, -3)), segment(1, (-10, -3))])


def test_the_peak_is_that_of_the_fullest_moment_for_so_many_rows():
    # before the second copy: 10 + 3 n, and 2 n of the first; then 100 + 5 n
    for rows in (0, 1, 2, 50):
        assert rising().peak(rows) == 110 + 10 * rows
    assert rising().peak() == rising().peak(1)


def test_a_profile_reads_back_as_it_was_written():
    written = json.loads(json.dumps(rising().as_json()))
    assert [row[:3] for row in written] == [[1, 10, 3], [2, 0, 2], [1, -10, -3]]
    again = Profile.from_json(written)
    assert [again.peak(rows) for rows in range(9)] == [rising().peak(rows) for rows in range(9)]
    assert again.as_json() == rising().as_json()


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ([(0, 0)], [(0, 0)]),
        ([(1, 9), (9, 1), (5, 5)], [(1, 9), (5, 5), (9, 1)]),
        ([(9, 1), (5, 5), (1, 9), (5, 5)], [(1, 9), (5, 5), (9, 1)]),
        ([(4, 4), (4, 5), (3, 5)], [(4, 5)]),  # as large in both numbers
        ([(4, 5), (5, 4), (5, 3), (5, 4)], [(4, 5), (5, 4)]),
        ([(2, 7), (8, 7), (8, 2)], [(8, 7)]),
        ([(fixed, 5) for fixed in range(99)], [(98, 5)]),
        ([(1, 9), (2, 8), (2, 7), (3, 8)], [(1, 9), (3, 8)]),
        # compared with the last that was kept, not with an earlier one
        ([(1, 9), (6, 8), (4, 7), (7, 6)], [(1, 9), (6, 8), (7, 6)]),
    ],
)
def test_only_points_that_are_highest_for_some_number_of_rows_are_written(points, kept):
    ((_, _, _, found),) = Profile([segment(1, highs=points)]).as_json()
    assert found == kept
