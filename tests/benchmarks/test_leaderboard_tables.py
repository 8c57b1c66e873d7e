"""Tables, README sections and figures of boards from records that never ran."""

import io

import pytest
from leaderboard_records import CPU, GPU, SMALL, TWO, by_hand, only, record, sample
from rich.console import Console

from benchmarks.leaderboard import board as boards
from benchmarks.leaderboard import figures, readme, tables


@pytest.fixture(scope="module")
def whole():
    return boards.build(sample(names=SMALL, workloads=TWO))


@pytest.fixture
def small():
    return by_hand()


def test_rows_of_text_go_by_the_clock(small):
    device = only(boards.build(small))
    assert [(e["rank"], e["title"], e["times"]) for e in tables.entries(device)] == [
        # one seed of Adam reaches the second target before K-FAC: three seeds do not decide
        ("1=", "K-FAC", ["2.00", "3.00"]),
        ("1=", "Adam", ["4.00", "missed"]),
    ]
    assert tables.entries(device, "steps")[1]["times"] == ["40", "missed"]
    with pytest.raises(ValueError, match="clocks are seconds"):
        tables.entries(device, "hours")


def test_the_terminal_shows_the_board(small):
    console = Console(width=120, file=io.StringIO())
    console.print(tables.board_table(only(boards.build(small))))
    text = console.file.getvalue()
    for word in ("kfac", "missed", "4.00", "Example CPU", "0.33", "speed-up"):
        assert word in text
    narrow = Console(width=60, file=io.StringIO())
    narrow.print(tables.board_table(only(boards.build(small)), wide=False))
    text = narrow.file.getvalue()
    assert "4.00" in text
    assert "speed-up" not in text.lower()


def test_markdown_is_short_and_keeps_the_best_first_order_contestant(whole):
    device = whole["devices"][0]
    lines = tables.markdown(device, most=1).splitlines()
    assert len(lines) == 2 + 2 + 2
    assert lines[2].startswith("| 1")
    assert "Adam" in lines[3]
    assert lines[-1].startswith(f"{len(device['rows']) - 2} more")


def test_markdown_keeps_a_bar_within_its_cell():
    device = only(boards.build([record(title="a | b")]))
    assert "a \\| b" in tables.markdown(device)


def test_readme_is_written_between_its_markers_only(tmp_path, whole):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nEnd.\n", encoding="utf-8")
    assert readme.update(path, whole)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\n{readme.BEGIN}\n")
    assert text.endswith(f"\n{readme.END}\n\nEnd.\n")
    assert "old" not in text
    assert "`make leaderboard`" in text
    assert "2026-11-01" in text
    assert "Example GPU" in text
    assert not readme.update(path, whole)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "text",
    ["", readme.BEGIN, f"{readme.END} {readme.BEGIN}", f"{readme.BEGIN * 2}{readme.END}"],
)
def test_readme_without_markers_is_an_error_and_stays_as_it_is(tmp_path, whole, text):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md must have one line <!-- leaderboard: begin"):
        readme.update(path, whole)
    assert path.read_text(encoding="utf-8") == text


def test_no_two_contestants_look_the_same():
    records = sample(workloads=TWO[:1], devices=(CPU, GPU), seeds=1, tuning=0)
    looks = figures.looks(row for d in boards.build(records)["devices"] for row in d["rows"])
    assert len({(look.light, look.dash, look.marker) for look in looks.values()}) == len(looks)
    assert len({(look.dark, look.dash, look.marker) for look in looks.values()}) == len(looks)
    assert looks["kfac"].light == looks["kfac-mc-lm"].light == "#CC79A7"
    assert looks["kfac"].dash == ""
    assert looks["adam"].open
    assert not looks["kfac"].open


def test_thinned_curves_keep_their_ends():
    chosen = figures.thinned(list(range(5001)), most=20)
    assert (chosen[0], chosen[-1]) == (0, 5000)
    assert 10 < len(chosen) <= 20
    assert chosen == sorted(set(chosen))
    # as many points from 0 to 70 as from 70 to 5000
    assert abs(sum(index <= 70 for index in chosen) - len(chosen) / 2) <= 2
    assert figures.thinned([0, 5, 10]) == [0, 1, 2]


def test_numbers_are_shortened_not_changed():
    assert figures.rounded({"a": [1.23456, 3, "x", None, float("inf"), 2.0, True]}) == {
        "a": [1.235, 3, "x", None, None, 2, True]
    }
