"""A report in a real browser: silent, narrow, legible, printable."""

import shutil

import pytest

import adapterkit
from tests.reports.test_report import HOSTILE, adapter

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
# a browser comes of the system, not of a package index: a machine without one skips these
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]

# of each text its contrast with what is behind it (WCAG 2), and the least of them
CONTRAST = """() => {
  const parts = text => {
    const n = text.match(/[\\d.]+/g).map(Number), unit = text.startsWith('color(') ? 1 : 255;
    return [n[0] / unit, n[1] / unit, n[2] / unit, n.length > 3 ? n[3] : 1];
  };
  const behind = element => {
    if (!element) return [1, 1, 1];
    const own = parts(getComputedStyle(element).backgroundColor);
    if (own[3] === 1) return own.slice(0, 3);
    const under = behind(element.parentElement);
    return under.map((value, i) => own[i] * own[3] + value * (1 - own[3]));
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll('main *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || element.closest('svg')) continue;
    const [a, b] = [light(parts(getComputedStyle(element).color)), light(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def pages(cached_folder, lora, llama):
    """A report with every section, one of hostile names, one of many experts, one of several."""

    def write(folder):
        report = lambda name, *its, **more: adapterkit.report(its, out=folder / name, **more)
        adapterkit.merge(llama, [lora], out=folder / "merged")
        report("whole.html", lora, base=llama, result=folder / "merged")
        hostile = {"modules": [f"m.0.{HOSTILE[:150]}"], "base_model_name_or_path": HOSTILE}
        report("hostile.html", adapter(folder / "<b>", **hostile))
        names = [f"m.layers.{n}.experts.{e}.up" for n in range(20) for e in range(256)]
        report("moe.html", adapter(folder / "moe", modules=names, rank=1))
        report("several.html", *(adapter(folder / f"n{seed}", seed) for seed in range(4)))

    return cached_folder("reports", write)


@pytest.mark.parametrize("name", ["whole", "hostile", "moe", "several"])
@pytest.mark.parametrize("width, scheme", [(360, "dark"), (1280, "light")])
def test_a_page_renders_in_both_schemes_without_requests(name, width, scheme, browser, pages):
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=True
    )
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((pages / f"{name}.html").as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [page.url]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    least, text = page.evaluate(CONTRAST)
    assert least >= 4.5, text
    unnamed = "[...document.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label'))"
    assert page.evaluate(f"{unnamed}.length") == 0
    heads = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(e => e.tagName)")
    assert heads[0] == "H1" and heads.count("H1") == 1
    context.close()


def test_the_page_prints_on_few_sheets(browser, pages):
    page = browser.new_page()
    page.goto((pages / "whole.html").as_uri())
    printed = page.pdf(format="A4")
    assert 1 <= printed.count(b"/Type /Page\n") <= 6
