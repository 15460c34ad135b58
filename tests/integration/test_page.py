"""The operator's page in a real browser, on a real server."""

import shutil
from collections.abc import Iterator

import httpx
import pytest
from checkpoints import add_tokenizer, make_checkpoint
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import Server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this host; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks, behind a key."""
    folder = tmp_path_factory.mktemp("shown") / "tiny"
    folder.mkdir()
    changes = {"vocab_size": 259, "max_position_embeddings": 512, "eos_token_id": None}
    make_checkpoint("llama", folder, **changes)
    key = folder.parent / "key"
    key.write_text("secret")
    cut = ["-pp", "2", "--set", f"server.api_key_file={key}"]
    with Server.start(add_tokenizer(folder), *cut) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


def test_the_page_needs_no_key_and_its_data_do(server: Server) -> None:
    page = httpx.get(server.url)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "tiny" not in page.text
    for path in ("/status", "/status/plan.svg", "/metrics"):
        assert httpx.get(f"{server.url}{path}").status_code == 401
    status = httpx.get(f"{server.url}/status", headers={"Authorization": "Bearer secret"}).json()
    assert (status["model"], status["state"]) == ("tiny", "ready")
    assert [(rank["rank"], rank["stage"]) for rank in status["ranks"]] == [(0, 0), (1, 1)]
    assert status["gpus"] == {"reason": "the ranks run on the CPU", "by_rank": {}}


@needs_browser
def test_an_operator_unlocks_the_page_and_streams_an_answer(
    server: Server, browser: Browser
) -> None:
    page: Page = browser.new_page()
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    # A refused key is in the console too, and meant.
    page.on(
        "console",
        lambda said: said.type == "error" and "401" not in said.text and faults.append(said.text),
    )
    page.goto(server.url)
    page.locator("#key").fill("secret")
    page.get_by_role("button", name="Unlock").click()
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#ranks tr")).to_have_count(2)
    expect(page.locator("#gpu-note")).to_contain_text("the ranks run on the CPU")
    expect(page.locator("#plan")).to_be_visible()
    assert page.locator("#plan").evaluate(
        "async (image) => (await image.decode(), image.naturalWidth)"
    )
    page.locator("#kind").select_option("text")
    page.locator("#max-tokens").fill("400")
    page.locator("#prompt").fill("<b>hello</b>")
    page.locator("#send").click()
    expect(page.locator("#answer")).not_to_be_empty()
    # It streams: there is text, and the answer goes on.
    assert page.locator("#stop").is_visible()
    length = len(page.locator("#answer").inner_text())
    expect(page.locator("#ended")).to_contain_text("length", timeout=20_000)
    assert len(page.locator("#answer").inner_text()) > length
    assert page.locator("#answer *").count() == 0
    expect(page.locator("#charts figure")).to_have_count(8)
    own = (server.url, "blob:", "data:")
    assert [url for url in asked if not url.startswith(own)] == []
    assert faults == []
    page.close()
