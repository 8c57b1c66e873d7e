"""The page of the leaderboard, as text and in a browser."""

import json
import re

import pytest
from leaderboard_records import CPU, SMALL, record, sample

from benchmarks.leaderboard import board as boards
from benchmarks.leaderboard import page
from ntk_analysis.results import write_json

WORKLOADS = ("digits-mse", "linear-teacher", "matrix-completion")


def data_of(text):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )


@pytest.fixture(scope="module")
def records():
    return sample(names=(*SMALL, "kfac-jax"), workloads=WORKLOADS, tuning=2)


@pytest.fixture(scope="module")
def written(records, tmp_path_factory):
    """A leaderboard's folder with its page."""
    folder = tmp_path_factory.mktemp("leaderboard")
    for entry in records:
        write_json(folder / "trials" / entry["key"][:2] / f"{entry['key']}.json", entry)
    return page.write(records, folder)


def test_the_page_lies_beside_the_trials_and_holds_each_of_them(records, written):
    assert written.name == "leaderboard.html"
    data = data_of(written.read_text(encoding="utf-8"))
    assert data["trials"] == "trials"
    linked = {key for key in re.findall(r"[0-9a-f]{64}", json.dumps(data))}
    assert {entry["key"] for entry in records} <= linked


def test_the_command_of_every_trial_can_be_put_together(records, written):
    data = data_of(written.read_text(encoding="utf-8"))
    commands = {entry["key"]: entry["command"] for entry in records}
    trials = [
        trial
        for device in data["devices"] for row in device["rows"]
        for cell in row["cells"] for trial in cell["trials"]
    ]  # fmt: skip
    assert trials
    for trial in trials:
        assert data["commands"][trial[8]].replace("{key}", trial[0]) == commands[trial[0]]


def test_the_page_needs_nothing_from_elsewhere(written):
    text = written.read_text(encoding="utf-8")
    outside = [url for url in re.findall(r"https?://[^\"'\s<)]+", text) if "w3.org" not in url]
    assert outside == []
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:|#)", text)


def test_texts_of_records_cannot_become_markup(tmp_path):
    nasty = "</script><script>alert(1)</script>&"
    text = page.write([record(title=nasty, damping=nasty)], tmp_path).read_text(encoding="utf-8")
    assert nasty not in text
    row = data_of(text)["devices"][0]["rows"][0]
    assert (row["title"], row["damping"]) == (nasty, nasty)


def test_a_file_name_and_another_folder_of_trials(tmp_path):
    path = page.write([record()], tmp_path / "deep" / "x.html", trials="../trials/")
    assert path == tmp_path / "deep" / "x.html"
    assert data_of(path.read_text(encoding="utf-8"))["trials"] == "../trials"


def test_no_records_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="no trials to score"):
        page.write([], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_javascript_there_are_the_verdict_and_the_ranking(written, records):
    text = written.read_text(encoding="utf-8")
    first = boards.build(records)["devices"][0]
    static = re.search(r"<noscript>(.*?)</noscript>", text, re.S)[1]
    titles = re.findall(r'<th scope="row">(.*?)</th>', static)
    assert titles == [row["title"] for row in first["rows"] if row["ranked"]]
    assert first["verdict"]["answer"] in text


def test_curves_are_those_of_the_median_trials_and_short(written, records):
    by_key = {entry["key"]: entry for entry in records}
    device = data_of(written.read_text(encoding="utf-8"))["devices"][0]
    cells = [cell for row in device["rows"] for cell in row["cells"] if cell["curve"]]
    assert len(cells) == len(WORKLOADS) * len(SMALL)
    for cell in cells:
        outcome = by_key[cell["shown"]]["outcome"]
        assert len(cell["curve"]["x"]) <= 28
        assert set(cell["curve"]["x"]) <= set(outcome["curve"]["steps"])
        assert cell["curve"]["x"][-1] == outcome["curve"]["steps"][-1]
        assert cell["curve"]["s"] == outcome["steps_to_target"]


# In a browser ----------------------------------------------------------------------------------


@pytest.fixture
def view(browser, written):
    """Opens the page; at the end nothing may have been complained of or fetched."""
    contexts, problems, requests = [], [], []

    def opened(width=1280, height=900, path=written, **options):
        context = browser.new_context(
            viewport={"width": width, "height": height}, reduced_motion="reduce", **options
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def column(tab, name, table="table"):
    cells = tab.locator(f"#{table} tbody td[data-column={name}]")
    return [text.split(" ")[0] for text in cells.all_inner_texts()]


def names(tab, table="table"):
    return [entry.get_attribute("data-who") for entry in tab.locator(f"#{table} tbody tr").all()]


def head(tab, key, table="table"):
    return tab.locator(f"#{table} th[data-key={key}]")


def test_a_heading_sorts_both_ways_and_says_so(view, records):
    tab = view()
    assert head(tab, "rank").get_attribute("aria-sort") == "ascending"
    expected = [row["contestant"] for row in boards.build(records)["devices"][0]["rows"]]
    assert names(tab) == expected

    head(tab, "w1").locator("button").click()
    assert head(tab, "w1").get_attribute("aria-sort") == "ascending"
    assert head(tab, "rank").get_attribute("aria-sort") == "none"
    texts = column(tab, "w1")
    times = [float(text) for text in texts if text[0].isdigit()]
    assert times == sorted(times)
    assert len(set(times)) > 3
    # whoever has no time stands at the end
    assert all(text[0].isdigit() for text in texts[: len(times)])
    assert texts[len(times) :]

    head(tab, "w1").locator("button").click()
    assert head(tab, "w1").get_attribute("aria-sort") == "descending"
    assert column(tab, "w1")[: len(times)] == [text for text in reversed(texts[: len(times)])]
    assert not column(tab, "w1")[-1][0].isdigit()


def test_a_heading_sorts_by_keyboard_and_keeps_the_focus(view):
    tab = view()
    head(tab, "score").locator("button").focus()
    tab.keyboard.press("Enter")
    assert head(tab, "score").get_attribute("aria-sort") == "descending"
    scores = [float(text) for text in column(tab, "score") if text[0].isdigit()]
    assert scores == sorted(scores, reverse=True)
    tab.keyboard.press("Space")
    assert head(tab, "score").get_attribute("aria-sort") == "ascending"
    head(tab, "contestant").locator("button").click()
    titles = tab.locator("#table tbody th").all_inner_texts()
    assert titles == sorted(titles, key=str.casefold)


def test_families_search_and_clock_choose_rows_and_numbers(view):
    tab = view()
    everyone = names(tab)
    tab.locator("#families input[value=natural-gradient]").uncheck()
    assert set(names(tab)) == {"sgd", "adam", "lbfgs", "kfac-jax"}
    assert set(tab.locator("#legend button").evaluate_all("b => b.map(x => x.dataset.who)")) == {
        "sgd", "adam", "lbfgs",
    }  # fmt: skip
    tab.locator("#families input[value=natural-gradient]").check()
    assert names(tab) == everyone
    tab.locator("#search").fill("monte kfac")
    assert names(tab) == ["kfac-mc-lm"]
    assert "1 of 8 contestants" in tab.locator("#count").inner_text()
    tab.locator("#search").fill("")
    seconds = column(tab, "w0")
    tab.locator("input[name=clock][value=steps]").check()
    steps = column(tab, "w0")
    assert steps != seconds
    assert all("." not in text for text in steps)


def test_the_ranks_of_one_ruleset_are_those_among_its_contestants(view, records):
    tab = view()
    tab.locator("#rulesets input[value=self-tuning]").uncheck()
    first = boards.build(records)["devices"][0]
    tuned = {row["contestant"]: row for row in first["rows"] if row["ruleset"] == "tuned"}
    shown = names(tab)
    assert set(shown) == set(tuned) == {"sgd", "adam", "kfac-jax"}
    ranked = [name for name in shown if tuned[name]["ranked"]]
    ranks = dict(zip(shown, column(tab, "rank"), strict=True))
    own = {name: tuned[name]["scores"]["seconds"]["own"]["rank"] for name in ranked}
    assert {name: ranks[name] for name in ranked} == own
    assert "ranks are those among the tuned ones" in tab.locator("#count").inner_text()


def test_a_machine_has_its_own_verdict_rows_and_numbers(view, records):
    tab = view()
    first, second = boards.build(records)["devices"]
    assert tab.locator("#answer").inner_text() == first["verdict"]["answer"]
    before = column(tab, "w2")
    tab.locator("#device").select_option("1")
    assert tab.locator("#answer").inner_text() == second["verdict"]["answer"]
    assert names(tab) == [row["contestant"] for row in second["rows"]]
    assert column(tab, "w2") != before
    assert "16 cores" in tab.locator("#environment").inner_text()


def test_a_number_opens_its_trials_which_open_their_json(view, records):
    tab = view()
    link = tab.locator('#table tr[data-who="adam"] td[data-column=w0] a')
    key = link.get_attribute("href").removesuffix(".json").rpartition("/")[2]
    assert link.get_attribute("href") == f"trials/{key[:2]}/{key}.json"
    link.click()
    dialog = tab.locator("#dialog")
    assert dialog.is_visible()
    text = dialog.inner_text()
    assert "Adam on digits-mse" in text
    trials = [
        r for r in records
        if r["config"]["contestant"] == "adam" and r["config"]["workload"] == "digits-mse"
        and r["config"]["environment"]["device"] == CPU["device"]
    ]  # fmt: skip
    assert len(trials) == 5
    for trial in trials:
        assert dialog.locator(f'a[href$="{trial["key"]}.json"]').count() == 1
        assert (trial["command"] in text) == (trial["config"]["role"] == "evaluation")
    assert f"{len(trials) - 2} of 3 trials reached" in text
    dialog.locator(f'a[href$="{key}.json"]').click()
    assert json.loads(tab.locator("pre").inner_text())["key"] == key


def test_the_rates_of_the_studies_and_earlier_rules_are_shown(view, tmp_path):
    tried = (0.01, 0.125, 0.035)
    entries = [record("adam", seed=seed, learning_rate=rate) for seed, rate in enumerate(tried)]
    entries.append(record("adam", seed=1001, role="tuning", learning_rate=0.375))
    before = record("adam", learning_rate=0.5, rules="0.9", day=-1)
    tab = view(path=page.write([*entries, before], tmp_path))
    past = tab.locator("#history tbody tr").all_inner_texts()
    assert ["0.9" in text.split("\t") for text in past] == [False, True]
    tab.locator('#table tr[data-who="adam"] td[data-column=w0] a').click()
    dialog = tab.locator("#dialog")
    assert "Learning rate 0.01 to 0.125 (tuned" in dialog.inner_text()
    rows = [text.split("\t")[:2] for text in dialog.locator("tbody tr").all_inner_texts()]
    assert rows[:3] == [["0", "0.01"], ["1", "0.125"], ["2", "0.035"]]
    assert rows[-1] == ["1001", "0.375"]


def test_the_dialog_closes_and_the_score_shows_its_parts(view):
    tab = view()
    tab.locator('#table tr[data-who="kfac"] td[data-column=score] a').click()
    dialog = tab.locator("#dialog")
    parts = [float(row.split("\t")[-1]) for row in dialog.locator("tbody tr").all_inner_texts()]
    score = float(re.search(r"^[\d.]+", dialog.locator("p").inner_text())[0])
    assert sum(parts) / len(parts) == pytest.approx(score, abs=2e-3)
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_curves_and_profiles_stand_out_with_their_contestant(view):
    tab = view()
    assert tab.locator("#charts figure").count() == len(WORKLOADS)
    assert tab.locator("#charts svg.chart").count() == 2 * len(WORKLOADS)
    # the better of two variants of K-FAC only
    assert tab.locator('#legend button[data-who^="kfac"]').count() == 1
    tab.locator("#variants").check()
    assert tab.locator('#legend button[data-who^="kfac"]').count() == 2
    tab.locator('#legend button[data-who="exact"]').click()
    tab.mouse.move(0, 0)
    bright = tab.locator(".line.on").evaluate_all("l => l.map(x => x.dataset.who)")
    assert set(bright) == {"exact"}
    assert len(bright) == 1 + 2 * len(WORKLOADS)
    assert tab.locator('#legend button[data-who="exact"]').get_attribute("aria-pressed") == "true"
    tab.keyboard.press("Escape")
    assert tab.locator(".line.on").count() == 0
    held_out = tab.locator("#charts .line .stroke").first.get_attribute("d")
    tab.locator("input[name=metric][value=a]").check()
    assert tab.locator("#charts .line .stroke").first.get_attribute("d") != held_out


def test_structures_have_their_isotropy_and_cost(view):
    tab = view()
    assert set(names(tab, "facts")) == {"exact", "kfac", "diagonal"}
    assert set(column(tab, "condition", "facts")) == {"1.5"}
    tab.locator("#which").select_option(label="matrix-completion")
    tab.locator("#facts tr[data-who=kfac] td[data-column=alpha] a").click()
    assert "matrix-completion" in tab.locator("#dialog").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(view, scheme):
    tab = view(390, 844, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.locator("#table tbody tr").count() == 8
    tab.locator('#table tr[data-who="exact"] td[data-column=w0] a').click()
    assert tab.locator("#dialog").bounding_box()["width"] <= 390
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]


def test_a_leaderboard_without_results_says_so(view, tmp_path):
    path = page.write([record(role="tuning", learning_rate=0.1)], tmp_path)
    tab = view(path=path)
    assert tab.locator("#answer").inner_text() == "No contestant has reached a target yet."
    assert tab.locator("#count").inner_text() == "No contestants."
    assert tab.locator("svg.chart").count() == 0


@pytest.mark.parametrize(
    "curves",
    [
        ([0, 1, 2], [0.0, 0.1, 0.2], [1.0, 1e30, None], [1.0, None, None]),
        ([0, 1, 2], [0.0, 0.1, 0.2], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0]),
        ([0], [0.0], [0.5], [0.5]),
    ],
    ids=["diverged", "zero", "one point"],
)
def test_curves_at_their_limits_are_drawn(view, tmp_path, curves):
    curve = dict(zip(("steps", "seconds", "train", "held_out"), curves, strict=True))
    path = page.write([record("kfac", seconds=0.0, steps=0, curve=curve)], tmp_path)
    tab = view(path=path)
    for clock in boards.CLOCKS:
        tab.locator(f"input[name=clock][value={clock}]").check()
        for metric in ("a", "b"):
            tab.locator(f"input[name=metric][value={metric}]").check()
            drawn = tab.locator("svg.chart").evaluate_all("c => c.map(x => x.outerHTML)")
            assert drawn
            assert not any("NaN" in chart or "Infinity" in chart for chart in drawn)
