"""The report: its page (parsed here, and opened in a headless Chromium where there is one), its text, its JSON."""

import html
import io
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from hf_elra.report.commands import print_all
from hf_elra.report.page import build_page, picture
from hf_elra.report.runs import find_runs
from hf_elra.report.svg import Curve, Mark, Scale, draw, scale_over, thinned, tick_text
from hf_elra.report.text import as_json, as_text, sparkline
from tests.test_imports import fresh
from tests.test_runs import FIRST, GROWN, history_of, write_run

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
OF_ONE_RUN = {
    *("loss", "eval_accuracy", "rate", "beginning", "batch", "cosine", "step_norm", "drift", "forwards", "speed"),
}
VOID = {"meta", "link", "input", "br"}


class Panels(HTMLParser):
    """The panels of a page: title, and by axis and scale how many curves are drawn."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.panel, self.view = {}, [], None, None
        self.loads = []
        self.feed(page)
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.loads += [told[name] for name in ("src", "href") if name in told]
        if tag == "figure":
            self.panel = self.found.setdefault(told["id"], {})
        elif tag == "div" and told.get("class") == "view":
            self.view = self.panel.setdefault((told["data-axis"], told["data-scale"]), [])
        elif tag == "path" and "data-label" in told:
            self.view.append(told["data-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes another one"


@pytest.fixture
def one(tmp_path):
    more = {"batch_size": lambda step: 8, "cropped": lambda step: 1, "drift": lambda step: step / 100}
    entries = [*FIRST, *history_of(**more), *GROWN]
    entries.append({"elra": "restart", "loss_of_update": 9.0, "taken_back": True, "step": 30})
    return find_runs([str(write_run(tmp_path / "one <b>&", entries))])


@pytest.fixture
def many(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"ours-{seed}", [*FIRST, *history_of(40 + seed)], seed=seed)
        entries = [{k: v for k, v in e.items() if k not in ("alpha", "cosine")} for e in history_of(30)]
        write_run(tmp_path / f"adamw-{seed}", entries, seed=seed, optim="adamw_torch")
    return find_runs([str(tmp_path)])


def test_the_page_of_one_run_has_every_panel_over_every_axis(one):
    page = build_page(one)
    panels = Panels(page)
    assert set(panels.found) == OF_ONE_RUN
    axes = {axis for axis, _ in panels.found["rate"]}
    assert axes == {"updates", "epochs", "samples", "tokens", "hours"}
    assert panels.found["loss"][("updates", "log")] == [
        "training loss", "its running mean", "validation loss of the averaged weights",
    ]  # fmt: skip
    assert list(panels.found["beginning"]) == [("", "linear")]
    assert page.count("taken back at update 30") == 3 * len(axes)  # on the loss, twice, and on the rate
    assert "crop in force in 50% of updates 1 to 40" in page
    assert "update 20: 12 samples, noise" in page
    assert "after them: 0.005" in page
    assert "No update was taken back" not in page
    (told,) = as_json(one)["runs"]
    assert told["series"]["drift"][-1] == (40, 0.4)
    assert "drift             ▁" in as_text(one)


def test_marks_that_would_lie_over_one_another_are_one(tmp_path):
    told = [{"elra": "restart", "taken_back": True, "step": step} for step in range(100, 900)]
    page = build_page(find_runs([str(write_run(tmp_path, [*history_of(100_000, every=500), *told]))]))
    assert 15 <= page.count('class="restart"') <= 6 * 15
    assert "taken back, at updates 100 to" in page


def test_a_page_loads_nothing_and_trusts_no_name(one, many):
    for runs in (one, many):
        page = build_page(runs)
        assert Panels(page).loads == []
        assert "default-src 'none'" in page
        assert not re.search(r"https?://", page)
        assert "<b>&<" not in page
    assert "one &lt;b&gt;&amp;" in build_page(one)


def test_every_drawing_is_well_formed_and_says_what_it_shows(one):
    drawings = re.findall(r"<svg viewBox=.*?</svg>", build_page(one), re.DOTALL)
    assert len(drawings) > 40
    for drawing in drawings:
        parsed = ElementTree.fromstring(drawing)
        assert "nan" not in drawing
        assert "inf" not in drawing
        assert re.match(r"[A-Z].*( over |rates: )", parsed.get("aria-label"))
    ElementTree.fromstring(picture(one[0]))


def test_several_runs_are_overlaid_by_group_over_what_is_comparable(many):
    page = build_page(many)
    panels = Panels(page).found
    assert {"loss", "eval_loss", "beginning", "rate"} <= set(panels)
    assert next(iter(panels["loss"])) == ("tokens", "linear")
    assert panels["loss"][("tokens", "linear")] == ["adamw_torch (median of 2)", "elra (median of 2)"]
    assert panels["cosine"][("tokens", "linear")] == ["elra (median of 2)"]
    assert page.count('class="band') > 10
    assert len(re.findall(r"<tr><td", page)) == 4 + 2


def test_an_axis_that_one_run_does_not_know_is_not_offered(one, many):
    for entry in many[0].history:
        entry.pop("tokens_seen", None)
    assert 'value="tokens"' not in build_page(many)
    assert 'value="tokens"' in build_page(one)


def test_runs_with_next_to_nothing_make_a_page(tmp_path):
    write_run(tmp_path / "first", [{"loss": 1.0, "learning_rate": 0.0, "step": 1}], finished=False)
    write_run(tmp_path / "nan", [{"loss": math.nan, "learning_rate": 1.0, "step": 1}])
    write_run(tmp_path / "second", FIRST[:1], finished=False)
    for name in ("first", "nan", "second", ""):
        runs = find_runs([str(tmp_path / name)])
        Panels(build_page(runs))
        assert as_text(runs)
        json.dumps(as_json(runs), allow_nan=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_in_a_browser(tmp_path, one, scheme):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    act = """<script>
        addEventListener("error", event => { document.body.dataset.failed = event.message; });
        const name = view => view.dataset.axis + " " + view.dataset.scale;
        const shown = () => views.filter(view => !view.hidden).map(name);
        const before = shown();
        axis.value = "hours"; axis.dispatchEvent(new Event("change"));
        log.checked = true; log.dispatchEvent(new Event("change"));
        const svg = views.find(view => !view.hidden).querySelector("svg"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove",
          { clientX: box.left + box.width * .99 * 586 / 600, clientY: box.top + 50, bubbles: true }));
        const ink = getComputedStyle(document.body);
        document.body.dataset.result = JSON.stringify(
          { before, after: shown(), told: told.textContent, ink: ink.color, back: ink.backgroundColor });
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(build_page(one).replace("</body>", act))
    flags = ["--no-sandbox", "--headless", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    flags.append(f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}")
    done = subprocess.run([browser, *flags, f"file://{file}"], capture_output=True, text=True, timeout=60, check=False)
    assert 'data-ready="yes"' in done.stdout, done.stderr
    assert "data-failed" not in done.stdout
    result = json.loads(html.unescape(re.search(r'data-result="(.*?)"', done.stdout)[1]))
    assert set(result["before"]) == {"updates linear", "updates log", " linear"}
    assert set(result["after"]) == {"hours linear", "hours log", " linear"}
    assert len(result["before"]) == len(result["after"]) == len(OF_ONE_RUN)
    loss = re.search(r"training loss: ([\d.]+)", result["told"])[1]
    assert float(loss) == pytest.approx(1.05, abs=0.01)
    assert (result["ink"], result["back"]) == (
        ("rgb(236, 236, 236)", "rgb(21, 23, 26)") if scheme == "dark" else ("rgb(26, 26, 26)", "rgb(255, 255, 255)")
    )


# ---- the command ----


def test_the_command_writes_a_page_or_prints(tmp_path, command_here):
    folder, page = str(write_run(tmp_path / "run")), tmp_path / "page.html"
    code, output, _ = command_here("report", folder, "-o", str(page))
    assert (code, output.split(" (")[0]) == (0, f"1 run: {page}")
    assert set(Panels(page.read_text()).found) >= {"loss", "rate"}
    code, output, _ = command_here("report", folder, "--text")
    assert code == 0
    assert "training loss     █" in output
    assert "✓ No update was taken back." in output
    code, output, _ = command_here("report", folder, "--json")
    (told,) = json.loads(output)["runs"]
    assert told["series"]["training_loss"][-1] == [40, 1.05]
    assert told["verdicts"][0]["text"] == "No update was taken back."
    assert command_here("report", folder, "-o", str(tmp_path))[0] == 2
    assert command_here("report", folder, "--txt")[2].startswith(
        "error: unrecognized arguments: --txt. Did you mean '--text'? "
    )


def test_a_terminal_that_knows_no_bars_gets_the_text_all_the_same(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", written)
    print_all("loss ▁█ 1.5\n")
    written.flush()
    assert written.buffer.getvalue() == b"loss ?? 1.5\n"


def test_a_report_needs_neither_torch_nor_transformers(tmp_path):
    folder = write_run(tmp_path / "run")
    words = ["hf-elra", "report", str(folder), "-o", str(tmp_path / "page.html")]
    text = f"""
        import sys
        sys.argv = {words}
        from hf_elra.cli import main
        try:
            main()
        except SystemExit:
            pass
        print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
    """
    assert fresh(text)[-1] == "[]"


def test_the_table_of_several_runs_as_text(many):
    lines = as_text(many).splitlines()
    header = next(line for line in lines if line.startswith("run "))
    rows = lines[lines.index(header) + 1 :]
    assert [row.split()[0] for row in rows] == ["adamw-1", "adamw-2", "median", "ours-1", "ours-2", "median"]
    assert rows[-1].split()[:5] == ["median", "of", "2", "elra", "41"]  # of 40 and 42 updates
    assert "group" not in header  # the optimizer says it


# ---- drawing ----


def test_sparklines():
    assert sparkline([0, 1, 2, 3]) == "▁▃▆█"
    assert sparkline([1, 10, 100], log=True) == "▁▅█" or sparkline([1, 10, 100], log=True) == "▁▄█"
    assert sparkline([1.0, math.nan, 1.0]) == "▁×▁"
    assert len(sparkline(list(range(1000)), width=20)) == 20


def test_thinning_keeps_the_ends_the_peaks_and_the_gaps():
    points = [(float(x), math.sin(x)) for x in range(5000)]
    points[2500], points[3000] = (2500.0, 99.0), (3000.0, math.nan)
    kept = thinned(points, 100)
    assert len(kept) < 150
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (2500.0, 99.0) in kept
    assert any(math.isnan(y) for _, y in kept)


def test_ticks_are_round_and_few():
    assert Scale(0, 1, 0, 100).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Scale(1e-3, 1e2, 0, 100, True).ticks() == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10, 100])
    assert 2 <= len(Scale(0.011, 0.018, 0, 100, True).ticks()) <= 8
    assert len(Scale(1e-12, 1e12, 0, 100, True).ticks()) <= 8
    assert [tick_text(v) for v in (0, 0.05, 1e-5, -1.5e-4, 2500, 25000, 3e6)] == [
        *("0", "0.05", "1e-5", "-1.5e-4", "2500", "25k", "3M"),
    ]


def test_scales_of_odd_values():
    assert scale_over([math.nan, math.inf], 0, 1) is None
    assert scale_over([-1.0, 0.0], 0, 1, log=True) is None
    flat = scale_over([3.0, 3.0], 0, 1)
    assert flat.low < 3 < flat.high
    assert draw([], x_title="x", y_title="y", summary="nothing") == ""


def test_marks_stay_within_the_drawing():
    curve = Curve("a", [(0, 0), (10, 1)])
    kinds = "restart", "vertical", "horizontal", "limit", "cross", "row"
    marks = [Mark(kind, 99.0, 99.0, end=200.0, text="far") for kind in kinds]
    drawing = draw([curve], x_title="x", y_title="y", summary="s", marks=marks)
    positions = [float(x) for x in re.findall(r' x1?="([\d.]+)"', drawing)]
    assert max(positions) <= 600
