"""The chat page in a real browser, where Chromium and its driver are installed."""

import json
import shutil

import pytest
from servers import wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("there is no Chromium with its driver", allow_module_level=True)

ENTER = "\ue007"  # WebDriver's key
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --window-size=1100,800
    --disable-background-networking --disable-component-update --disable-sync
"""


@pytest.fixture
def browser(server, tmp_path):
    options = webdriver.ChromeOptions()
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    with webdriver.Chrome(options, service) as browser:
        browser.get(server.url)
        yield browser


def turns(browser, kind: str) -> list[str]:
    return [one.text for one in browser.find_elements("css selector", f".turn.{kind}")]


def say(browser, text: str, **settings: str) -> None:
    for name, value in settings.items():
        browser.find_element("id", name).send_keys(value)
    browser.find_element("id", "text").send_keys(text + ENTER)
    wait_until(
        lambda: browser.find_element("id", "send").text == "Send" and turns(browser, "model")
    )


def test_a_conversation(browser, server):
    wait_until(lambda: "demo" in browser.find_element("id", "model").text)
    say(browser, "Who are you?", temperature="0", max_tokens="5")
    asked = {"messages": [{"role": "user", "content": "Who are you?"}]}
    own = server.post("/v1/chat/completions", asked | {"temperature": 0, "max_tokens": 5}).json()
    (answer,) = turns(browser, "model")
    text, note = answer.rsplit("\n", 1)
    assert text == own["choices"][0]["message"]["content"].strip()
    assert note.startswith("5 tokens · ")
    assert "tokens/s" in note
    assert "cut at its length" in note
    wait_until(lambda: "tokens generated" in browser.find_element("id", "metrics").text)

    say(browser, "<b>And</b> you?")
    wait_until(lambda: len(turns(browser, "model")) == 2)
    assert turns(browser, "user") == ["Who are you?", "<b>And</b> you?"]
    assert turns(browser, "error") == []
    browser.find_element("id", "clear").click()
    assert turns(browser, "user") == []


def test_an_error_is_shown_and_the_conversation_goes_on(browser):
    browser.find_element("id", "text").send_keys("x" + ENTER)
    wait_until(lambda: turns(browser, "model"))
    wait_until(lambda: browser.find_element("id", "send").text == "Send")
    browser.find_element("id", "max_tokens").send_keys("-5")
    browser.find_element("id", "text").send_keys("y" + ENTER)
    wait_until(lambda: turns(browser, "error"))
    assert turns(browser, "error") == ["max_tokens -5 is outside 1..9223372036854775807"]
    browser.find_element("id", "max_tokens").clear()
    browser.find_element("id", "text").send_keys("z" + ENTER)
    wait_until(lambda: len(turns(browser, "model")) == 2)


def test_an_answer_can_be_stopped(browser, server, slow_steps):
    browser.find_element("id", "text").send_keys("x" + ENTER)
    wait_until(lambda: browser.find_element("id", "send").text == "Stop")
    browser.find_element("id", "send").click()
    wait_until(lambda: browser.find_element("id", "send").text == "Send")
    wait_until(lambda: server.engine.metrics()["running"] == 0)
    assert turns(browser, "error") == []


def test_the_page_asks_this_server_alone(browser, server):
    say(browser, "x", max_tokens="1")
    sent = [
        json.loads(entry["message"])["message"]["params"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    asked = [one["request"]["url"] for one in sent if one["documentURL"].startswith(server.url)]
    assert len(asked) > 2
    assert all(url.startswith((server.url, "data:")) for url in asked), asked
    assert [one for one in browser.get_log("browser") if one["level"] == "SEVERE"] == []
