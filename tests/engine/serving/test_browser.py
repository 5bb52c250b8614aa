"""The page in a real browser, without a window."""

import shutil

import pytest

from bench.prose import language_reference
from longshadow import LLM
from longshadow.engine.runtime import RequestTooLong
from tests.engine.serving.conftest import PATIENCE, serving, wait_until
from tests.engine.serving.fake_engine import FakeEngine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs Chromium on the PATH", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

FACT = "The secret launch code of the Aurora station is 7412."
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser():
    # Chromium's sandbox needs rights that containers and root lack; the page comes from this test alone.
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A new page that fails the test when its script does."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    failures = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("dialog", lambda dialog: failures.append(f"a dialog: {dialog.message}"))
    yield page
    context.close()
    assert failures == []


def file_of(text, name="report.txt"):
    return {"name": name, "mimeType": "text/plain", "buffer": text.encode()}


def ask(page, question):
    page.fill("#question", question)
    page.keyboard.press("Enter")


def last_answer(page):
    """The last answer once it is complete."""
    page.wait_for_selector(".answer[aria-busy=true]", state="detached")
    return page.locator(".answer p").last.inner_text()


@pytest.mark.slow
def test_a_planted_fact_is_found(page, smollm2):
    prose = language_reference()
    text = f"{prose[:3000]}\n\n{FACT}\n\n{prose[3000:6000]}"
    llm = LLM(smollm2.model, tokenizer=smollm2.tokenizer, max_model_len=4096, device_memory="2GB")
    with serving(llm, model_name="SmolLM2") as server:
        page.goto(server.url)
        page.wait_for_selector("#dot[data-state=on]")
        assert page.inner_text("#model") == "SmolLM2"
        page.set_input_files("#file", file_of(text))
        page.wait_for_selector("#reading-text:has-text('tokens read')")
        assert page.get_attribute("#meter", "aria-valuenow").isdecimal()
        assert page.is_disabled("#question")
        page.wait_for_selector("#memory:not([hidden])")
        assert page.inner_text("#document-name") == "report.txt"
        assert page.inner_text("#ratio").endswith("× smaller")
        device, host, full = (
            page.locator(f"#{name}-bar").bounding_box()["width"] for name in ("device", "host", "full")
        )
        assert 0 < device < host < full
        ask(page, "What is the secret launch code of the Aurora station?")
        assert "7412" in last_answer(page)
        assert "tokens were there already" in page.locator(".answer .quiet").last.inner_text()
        wait_until(lambda: page.inner_text("#engine-running") == "0")
        page.click("#remove")
        page.click("#remove")
        page.wait_for_selector("body[data-view=empty]")
        assert llm.statistics().num_documents == 0


def test_a_server_that_is_down_is_told_of(page):
    with serving(FakeEngine(tempo=0.05), grace_seconds=0.1) as server:
        page.goto(server.url)
        page.set_input_files("#file", file_of("some text"))
        page.wait_for_selector("#question:enabled")
        assert page.is_hidden("#banner")
        ask(page, "And?")
        page.wait_for_selector(".answer p:has-text('0 1 2')")
        server.stop()
        page.wait_for_selector(".answer .failure")
        assert "closed" in page.inner_text(".answer .failure")
        page.wait_for_selector("#banner:not([hidden])")
        assert "cannot be reached" in page.inner_text("#banner")
        ask(page, "Still there?")
        page.wait_for_selector(".failure:has-text('cannot be reached')")
        assert page.get_attribute("#dot", "data-state") == "off"
        page.set_input_files("#file", file_of("more text"))
        page.wait_for_selector("#adding-failure:has-text('cannot be reached')")


def test_what_fails_can_be_asked_again(page):
    engine = FakeEngine(failure=RequestTooLong("the prompt is too long"))
    with serving(engine) as server:
        page.goto(server.url)
        page.set_input_files("#file", file_of("some text"))
        page.wait_for_selector("#question:enabled")
        ask(page, "And?")
        page.wait_for_selector(".failure:has-text('the prompt is too long')")
        engine.failure = None
        page.click("text=Ask again")
        assert last_answer(page).startswith("0 1 2")
        assert page.locator(".asked").all_inner_texts() == ["And?"]


def test_texts_stay_texts(page):
    with serving(FakeEngine(word=MARKUP + "{}", document_tempo=0.2), model_name=MARKUP) as server:
        page.goto(server.url)
        page.set_input_files("#file", file_of(MARKUP, name=f"{MARKUP}.txt".replace("/", "")))
        page.wait_for_selector("#question:enabled")
        ask(page, MARKUP)
        assert last_answer(page).startswith(MARKUP)
        assert page.inner_text(".asked") == MARKUP
        assert page.inner_text("#document-name").startswith("<img src=x")
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 1


def test_by_keyboard_alone(page):
    engine = FakeEngine(tempo=0.05)
    with serving(engine) as server:
        page.goto(server.url)
        page.wait_for_selector("#dot[data-state=on]")
        page.focus("#text")
        page.keyboard.insert_text("A text that was pasted.")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#question:enabled")
        assert page.inner_text("#document-name") == "Pasted text"
        page.focus("#question")
        page.keyboard.insert_text("First line")
        page.keyboard.press("Shift+Enter")
        page.keyboard.insert_text("second line")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer p:has-text('0 1 2')")
        assert page.inner_text(".asked") == "First line\nsecond line"
        assert page.inner_text("#ask") == "Stop"
        page.focus("#question")
        page.keyboard.press("Escape")
        page.wait_for_selector(".answer .quiet:has-text('stopped')")
        wait_until(lambda: engine.num_open == 0)
        assert page.inner_text("#ask") == "Ask"


def test_a_key_is_asked_for_and_kept(page):
    with serving(FakeEngine(), api_key="the-key") as server:
        page.goto(server.url)
        page.wait_for_selector("#sign-in[open]")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#sign-in[open]")
        page.fill("#key", "the-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:has-text('tiny')")
        page.reload()
        page.wait_for_selector("#model:has-text('tiny')")
        assert page.is_hidden("#sign-in")


def test_several_documents(page):
    with serving(FakeEngine(document_tempo=0.2)) as server:
        page.goto(server.url)
        for name in ("one.txt", "two.txt", "three.txt"):
            page.wait_for_selector("#dot[data-state=on]")
            page.set_input_files("#file", file_of(name * 5, name=name))
            page.wait_for_selector(f"#document-name:has-text('{name}')")
        assert page.locator("#documents b").all_inner_texts() == ["one.txt", "two.txt"]
        page.click("#documents button:has-text('one.txt')")
        page.wait_for_selector("#question:enabled")
        ask(page, "About one?")
        last_answer(page)
        page.click("#documents button:has-text('two.txt')")
        assert page.locator(".asked").count() == 0
        page.click("#documents button:has-text('one.txt')")
        assert page.inner_text(".asked") == "About one?"
        page.reload()
        page.wait_for_selector("#document-name:has-text('three.txt')")


def test_what_is_no_text_is_refused(page):
    with serving(FakeEngine(document_failure=ValueError("the document is strange")), max_body_bytes=5000) as server:
        page.goto(server.url)
        page.wait_for_selector("#dot[data-state=on]")
        page.set_input_files("#file", file_of("PK\x00\x01", name="report.docx"))
        page.wait_for_selector("#adding-failure:has-text('not a text file')")
        page.set_input_files("#file", file_of("x" * 6000))
        page.wait_for_selector("#adding-failure:has-text('larger than 5,000 bytes')")
        page.set_input_files("#file", file_of("some text"))
        page.wait_for_selector("#broken-text:has-text('the document is strange')")


@pytest.mark.parametrize("width", [320, 768, 1024, 1920])
def test_nothing_sticks_out(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    with serving(FakeEngine(), model_name="a-model-with-a-rather-long-name-" * 3) as server:
        page.goto(server.url)
        page.wait_for_selector("#dot[data-state=on]")
        sizes = "() => [document.documentElement.scrollWidth, innerWidth]"
        assert len(set(page.evaluate(sizes))) == 1
        page.set_input_files("#file", file_of("some text", name="a-name-without-any-break-" * 6 + ".txt"))
        page.wait_for_selector("#question:enabled")
        ask(page, "an-endless-word-" * 30)
        last_answer(page)
        assert len(set(page.evaluate(sizes))) == 1
