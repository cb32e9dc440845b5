"""No number of the pages is other than in its file."""

import json
import re
import statistics

import pytest
import show_results
from bench_list import BENCHES
from benchmarks.results import FOLDER
from show_results import BLOCK, ROOT, pages, shown, updated

FILES = sorted(FOLDER.glob("*.json"))
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?\s?(?:%|x\b|dB|ms\b|points|MiB)")


def test_every_page_shows_what_the_files_hold():
    wrong = [str(page.relative_to(ROOT)) for page in show_results.outdated()]
    assert not wrong, "python examples/show_results.py --write"


def test_a_number_that_differs_is_found(monkeypatch):
    page = ROOT / "docs" / "results.md"
    real = show_results.load

    def other(stem, *rest):
        run = real(stem, *rest)
        if stem == "gpt_small_cpu":
            run["rows"][0]["score"] += 0.01
        return run

    monkeypatch.setattr(show_results, "load", other)
    assert updated(page.read_text()) != page.read_text()


def test_the_pages_of_results_have_no_numbers_of_their_own():
    """Outside of generated tables nothing is claimed that no file holds."""
    for name in ("docs/results.md", "README.md", "docs/failures.md"):
        text = BLOCK.sub("", (ROOT / name).read_text())
        if name == "docs/failures.md":  # speaks of what a rule or a bit does, which is no measurement
            text = text.replace("6 dB", "").replace("near 0 dB", "").replace("100 %", "").replace("5 %", "")
        assert NUMBER.findall(text) == [], name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_whole_and_of_a_benchmark(file):
    run = json.loads(file.read_text())
    keys = ["benchmark", "date", "machine", "versions", "commit", "arguments", "rows"]
    assert list(run) == keys + ["unfinished"] * ("unfinished" in run)
    assert run["rows"] and re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"]) and "torch" in run["versions"]
    bench, arguments = BENCHES.get(run["benchmark"]), run["arguments"]
    if bench is None or "size" not in arguments:
        return  # a script's own `--save`
    assert file.name == bench.file(arguments["size"], arguments["device"])
    wanted = bench.sizes[arguments["size"]]
    assert {key: arguments[key] for key in wanted} == wanted, "settings of the list, so that it counts as done"


def test_every_block_names_a_view_and_a_benchmark():
    for page in pages():
        for _, view, stems, _ in BLOCK.findall(page.read_text()):
            assert view in show_results.VIEWS, page
            for stem in stems.split():
                name, size, device = stem.rsplit("_", 2)
                assert size in BENCHES[name].sizes and device in ("cpu", "cuda"), f"{page}: {stem}"


def test_what_was_not_run_says_so():
    said = shown("accuracy", ["gpt_full_nowhere"])
    assert said == "Not run yet: `python examples/bench.py gpt --size full` on a CPU."
    assert "on a GPU" in show_results.not_run("gpt_full_cuda")
    with pytest.raises(ValueError, match="choose from"):
        shown("nothing", [])


# Views


def run_of(rows, **arguments):
    return {
        "benchmark": "toy",
        "date": "2026-01-02",
        "machine": "a machine, AVX512",
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789-dirty",
        "arguments": {"size": "small", "device": "cpu", **arguments},
        "rows": rows,
    }


def scores(recipe, values, gemms=3):
    same = {"recipe": recipe, "width": "", "train_loss": 1.0, "integer_gemms": gemms, "gemms": 3, "seconds": 1.0}
    return [same | {"seed": i, "score": score, "diverged_at": 7 if score is None else None} for i, score in enumerate(values)]


def test_accuracy_is_compared_seed_by_seed():
    rows = scores("bf16", [2.0, 4.0, 3.0], 0) + scores("int8", [2.02, 4.08, 3.03])
    text = show_results.accuracy(run_of(rows, task="toy", metric="loss", better="lower"))
    percent = [1.0, 2.0, 1.0]
    assert f"+{statistics.fmean(percent):.2f} ± {statistics.stdev(percent) / 3**0.5:.2f}" in text
    assert "worse" in text and "3 of 3" in text and "3.0000 ± 1.0000" in text
    assert "commit 0123456 (with changes)" in text and "2026-01-02" in text
    higher = show_results.accuracy(
        run_of(scores("fp32", [80.0, 82.0]) + scores("int8", [81.0, 82.0]), task="t", metric="m", better="higher")
    )
    assert "+0.50 ± 0.50" in higher and "within noise" in higher


def test_a_run_that_diverged_is_counted():
    text = show_results.accuracy(
        run_of(scores("bf16", [2.0, 2.0]) + scores("int4", [None, 3.0]), task="t", metric="m", better="lower")
    )
    line = next(line for line in text.splitlines() if "int4" in line)
    assert "3.0000" in line and line.rstrip(" |").endswith("1")


def test_times_are_compared_round_by_round():
    rows = [
        {"name": "bf16", "times": [10.0, 20.0, 30.0], "gradient_snr_db": None, "integer_gemms": 0},
        {"name": "int8", "times": [5.0, 20.0, 10.0], "gradient_snr_db": 38.44, "integer_gemms": 12},
    ]
    line = show_results.blocks(run_of(rows)).splitlines()[3]
    assert "10.0" in line and "2.00x (1.00 - 3.00)" in line and "38.4" in line


def test_a_peer_that_is_missing_has_its_reason():
    size = {"shape": "8x8x8", "tokens": 8, "in": 8, "out": 8}
    numbers = {"ms": 1.0, "times_bf16": 1.0, "quartiles_of_ratio": [1.0, 1.0], "peak_mb": 2.0, "relative_error": {"y": 0.001}}
    ran = {"integer_gemms": 0, "kernels": []}
    rows = [
        {**size, "variant": "bf16", **numbers, **ran},
        {**size, "variant": "int8", **numbers, **ran, "times_bf16": 2.0, "quartiles_of_ratio": [1.5, 2.5]},
        {**size, "variant": "other", "left_out": "ImportError: no other"},
    ]
    text = show_results.layers(run_of(rows))
    assert "- `other`: ImportError: no other" in text and "y 0.10" in text and "2.00x (1.50 - 2.50)" in text


def test_filtered_recipes_that_lose_are_named():
    size = {"model": "llama", "width": 8, "layers": 1, "tokens": 4}
    same = {"ms": 1.0, "quartiles_of_ratio": [1.0, 1.0], "peak_mb": None, "relative_error": {"y": 0.001}, "integer_gemms": 0}
    rows = [
        {**size, **same, "variant": variant, "times_bf16": ratio}
        for variant, ratio in (("bf16", 1.0), ("int8", 0.5), ("int8+filter", 1 / 1.04), ("int4+filter", 1 / 1.06))
    ]
    text = show_results.layers(run_of(rows))
    assert "Slower than bf16 by more than 5% under the filter: 1 of 2: `int4+filter` at 8, 1, 4." in text
    assert [cell.strip() for cell in text.splitlines()[0].split("|")[1:4]] == ["width", "layers", "tokens"]
    assert "under the filter" not in show_results.layers(run_of(rows[:2]))


def test_kernels_have_their_rate_beside_a_copy():
    gemm = {"shape": "toy", "m": 2, "n": 3, "k": 4, "kernel": "bf16 mm", "ms": 0.5, "tera_ops": 700.4}
    copy = {"m": 2, "n": 3, "kernel": "copy of bf16", "ms": 0.1, "gb_per_s": 4000.0, "of_copy": 1.0}
    text = show_results.kernels({**run_of([gemm, copy]), "unfinished": True})
    assert "| 2 x 3 x 4 " in text and "| 700 " in text and "| 100% " in text and "stopped before its end" in text
    assert "GB/s" not in show_results.kernels(run_of([gemm]))


def test_slopes_saved_bytes_and_failures():
    rows = [
        {"axis": "layers", "value": v, "variant": "bf16", "ms": 3.0 * v, "saved": v * v, "peak": None, "compile_s": 1.0}
        for v in (1, 2, 4)
    ]
    text = show_results.growing(run_of(rows))
    assert "| `bf16`" in text and "1.00" in text and "2.00" in text and "0.00" in text
    cells = [{"model": m, "recipe": "int8", "MiB": 1.0, "x bf16": x, "SNR dB": 40.0} for m, x in (("GPT", 0.456), ("MLP", 0.5))]
    assert "0.46x (40.0 dB) | 0.50x (40.0 dB)" in show_results.saved(run_of(cells))
    wrong = [
        {"case": "Few", "run": "bf16", "loss": 2.0, "percent": 0.0, "signs": {"SNR, dB": None}},
        {"case": "Few", "run": "`int2`", "loss": None, "percent": None, "signs": {"SNR, dB": -3.14}},
    ]
    assert "diverged" in show_results.failures(run_of(wrong)) and "-3.14" in show_results.failures(run_of(wrong))


def test_targets_are_reached_within_the_bound_or_the_noise(monkeypatch):
    def verdict(ours, bound, lower=True):
        rows = show_results.from_json(scores("bf16", [2.0, 2.0, 2.0]) + scores("int8", ours))
        return show_results._reached(rows, "int8", bound, lower)

    assert verdict([2.002, 2.004, 2.006], 0.3) == "yes" and verdict([2.01, 2.0101, 2.0102], 0.3) == "no"
    assert verdict([2.2, 1.9, 2.0], 0.3) == "yes", "within two standard errors"
    assert verdict([1.6, 1.61, 1.62], 0.3, lower=False) == "no" and verdict([2.5, 2.5, 2.5], 0.3, lower=False) == "yes"
    text = show_results.targets()
    assert "`saved`" in text and "yes" in text
    monkeypatch.setattr(show_results, "load", lambda stem: None)
    assert show_results.targets().count("not run") == len(show_results.TARGETS)


def test_images_are_found_from_every_page():
    ways = {str(p.relative_to(ROOT)): show_results.way_to_images(p) for p in pages()}
    assert (
        ways["README.md"] == "docs/images" and ways["docs/results.md"] == "images" and ways["docs/papers/index.md"] == "../images"
    )
