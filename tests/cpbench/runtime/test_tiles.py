"""The loop over tiles, whole and sampled."""

from __future__ import annotations

import pytest

from cpbench.runtime.tiles import growing_rows, sampled_tiles, tile_times, tiles

SHAPES = [(rows, size) for rows in (0, 1, 7, 8, 16, 17, 24, 100, 104) for size in (1, 8, 50, None)]


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_tiles_cover_every_row_once(rows: int, size: int | None) -> None:
    """Tiles follow one another, none is longer than asked."""
    found = list(tiles(rows, size))

    assert [row for tile in found for row in range(rows)[tile]] == list(range(rows))
    assert all(tile.stop - tile.start <= (size or rows) for tile in found)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_sampled_tiles_stand_for_all(rows: int, size: int | None, sums: bool) -> None:
    """Weighted by what each stands for, sampled tiles have the rows of all tiles, and every length is among them."""
    whole = list(tiles(rows, size, sums=sums))
    with sampled_tiles():
        found = [(tile.stop - tile.start, tile_times()) for tile in tiles(rows, size, sums=sums)]

    assert sum(length * times for length, times in found) == rows
    assert sum(times for _, times in found) == len(whole)
    assert len(found) <= (4 if sums else 3)
    assert {length for length, _ in found} == {tile.stop - tile.start for tile in whole}


def test_the_tile_after_a_sum_exists_is_sampled() -> None:
    """The third tile is the first that runs beside a finished sum, so it and no other stands for the rest."""
    with sampled_tiles():
        assert [(t.start, tile_times()) for t in tiles(60, 10, sums=True)] == [(0, 1), (10, 1), (20, 4)]
        assert [(t.start, tile_times()) for t in tiles(65, 10)] == [(0, 1), (10, 5), (60, 1)]


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 6, 7, 8, 12, 13, 80])
def test_sampled_rows_stand_for_a_triangle(rows: int) -> None:
    """Rows, and what grows by one from row to row, add up; the first three and the last are there."""
    with sampled_tiles():
        found = [(row, tile_times()) for row in growing_rows(rows)]
        assert tile_times() == 1

    assert list(growing_rows(rows)) == list(range(rows))
    assert sum(times for _, times in found) == rows
    assert sum(row * times for row, times in found) == sum(range(rows))
    assert {*range(min(rows, 3)), *range(rows)[-1:]} <= {row for row, times in found if times == 1}
    assert len(found) <= 6


def test_loops_inside_loops_multiply_and_end() -> None:
    """The inner tile of a tile that stands for 4 stands for 4 times its own; after a loop nothing is left of it."""
    with sampled_tiles():
        seen = [tile_times() for _ in tiles(50, 10) for _ in tiles(30, 10)]
        for _ in tiles(50, 10):
            break

        assert seen == [1, 2, 4, 8]
        assert tile_times() == 1
