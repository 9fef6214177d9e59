from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from mball.server.config import KeyConfig
from tests.chromium import Page, browser, executable
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Gateway, Start

KEY, GUEST = "mb-operator", "mb-guest"
EVIL = "<img/src=x/onerror=alert(1)>"


def _key(name: str, key: str, *, admin: bool = False) -> KeyConfig:
    return KeyConfig(name=name, sha256=hashlib.sha256(key.encode()).hexdigest(), admin=admin)


KEYS = (_key("operator", KEY, admin=True), _key("guest", GUEST))


async def _open(page: Page, running: Gateway, key: str, **size: int) -> None:
    """By the keyboard alone: the key's field has the focus."""
    await page.open(f"{running.url}/ui", **size)
    await page.until("document.activeElement.id === 'key'")
    await page.type(key)
    await page.press("Enter")
    await page.until("!document.querySelector('main').hidden")


async def _tab_to(page: Page, label: str) -> None:
    for _ in range(40):
        await page.press("Tab")
        if await page.value(f"(document.activeElement.ariaLabel || document.activeElement.textContent) === '{label}'"):
            return
    pytest.fail(f"Tab does not come to {label}")


async def test_the_page_is_its_own_and_runs_nothing_else_s(gateway: Start) -> None:
    running = await gateway(model("a"), api_keys=KEYS)
    async with running.http.get(running.url + "/ui") as response:
        policy, text = response.headers["content-security-policy"], await response.text()
        assert response.status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie =", text)
    async with running.http.get(running.url + "/mball/v1/state") as response:
        assert response.status == 401


async def test_an_operator_moves_models_and_chats_by_keyboard_alone(gateway: Start, tmp_path: Path) -> None:
    executable()
    running = await gateway(model("a"), model(EVIL), model("team/b", Knobs(tokens=4)), api_keys=KEYS)
    async with browser(tmp_path / "profile") as page:
        await _open(page, running, KEY)
        await page.until("document.querySelectorAll('#rung-stopped .model').length === 3")
        await _tab_to(page, "load a")
        await page.press("Enter")
        await page.until("document.querySelector('#rung-device .model h4')?.textContent === 'a'")
        # It goes on from the button, where its model has gone.
        assert await page.value("document.activeElement.ariaLabel") == "load a"
        await _tab_to(page, "pin a")
        await page.press(" ")
        await page.until("[...document.querySelectorAll('button')].some((b) => b.ariaLabel === 'unpin a')")
        assert running.state("a")["pinned"]
        await page.press(" ")
        await page.until("[...document.querySelectorAll('button')].some((b) => b.ariaLabel === 'pin a')")
        await page.until("document.querySelector('#bars .legend').textContent.includes('a 8')")
        await page.until("document.querySelector('#log').textContent.includes('a: promoted')")
        # A name with a slash, and an answer that comes in pieces.
        await page.value("document.getElementById('model').value = 'team/b'; document.getElementById('text').focus()")
        await page.type("Hello")
        await _tab_to(page, "Send")
        await page.press("Enter")
        await page.until("document.querySelector('#said .assistant')?.textContent === 'team/b 1 2 3 '")
        await page.until("document.getElementById('stop').disabled")
        # What is shown is text, whatever its name.
        assert EVIL in await page.value("document.getElementById('ladder').textContent")
        assert await page.value("document.querySelectorAll('main img, main script').length") == 0
        await page.screenshot(tmp_path / "wide.png")
        for width in (390, 1280):
            await page.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
            )
            assert await page.value("document.documentElement.scrollWidth <= innerWidth"), width
        assert (
            await page.value("JSON.stringify([localStorage.length, sessionStorage.length, document.cookie])")
            == '[0,0,""]'
        )
        assert not [said for said in page.console if "401" not in said]
        assert {url.split("/")[2] for url in page.requests if not url.startswith("data:")} == {
            running.url.split("/")[2]
        }


async def test_on_a_phone_and_with_a_guest_s_key(gateway: Start, tmp_path: Path) -> None:
    executable()
    running = await gateway(model("a"), model("b"), api_keys=KEYS)
    async with browser(tmp_path / "profile") as page:
        await page.open(f"{running.url}/ui", width=390, height=844)
        await page.until("document.activeElement.id === 'key'")
        await page.type("mb-wrong")
        await page.press("Enter")
        await page.until("document.getElementById('status').textContent.includes('not known')")
        await page.type(GUEST)
        await page.press("Enter")
        await page.until("!document.querySelector('main').hidden")
        assert await page.value("[...document.querySelectorAll('.operator')].every((section) => section.hidden)")
        assert await page.value("document.documentElement.scrollWidth") <= 390
        await page.screenshot(tmp_path / "guest.png")
        await _open(page, running, KEY, width=390, height=844)
        await page.until("document.querySelectorAll('.model').length === 2")
        assert await page.value("document.documentElement.scrollWidth") <= 390
        small = (
            "[...document.querySelectorAll('main button')].filter((b) => b.offsetParent && b.offsetHeight < 40).length"
        )
        assert await page.value(small) == 0, "buttons for fingers"
        await page.screenshot(tmp_path / "phone.png")
