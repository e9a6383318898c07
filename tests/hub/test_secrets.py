"""No message, log or receipt holds a token."""

import json
import re

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from adapterkit.bases.hub.errors import quiet_library
from tests.support.hub_client import FILES, REPO, TOKEN, ClientError, during
from tests.support.hub_server import Fault, Hub


def test_no_message_holds_a_secret(connect, output):
    with Hub(token="another") as hub:
        hub.repo("org/private", private=True)
        hub.commit("org/private", FILES)
        opaque = "of-another-shape-secretsecret"
        client = connect(
            hub, HF_TOKEN=opaque, HF_ENDPOINT=hub.url.replace("://", "://user:passw0rd@")
        )
        error = [
            client.refusal(f"HubFolder(parse('{REPO}'))"),
            client.refusal("HubFolder(parse('org/private'))"),
            client.refusal(f"push(Path('{output}'), '{REPO}')"),
        ]
        assert "credentials" in error[0].text and "hf auth login" in error[0].text
        echo = json.dumps(
            {"error": f"bad token {opaque} or {TOKEN} at https://cdn.example/x?Signature=abc123"}
        )
        for status in (400, 401, 403, 404, 418, 429, 500):
            hub.faults = lambda asked, status=status: Fault(status=status, body=echo.encode())
            with pytest.raises(ClientError) as caught:
                client("HubFolder(parse('org/private'))")
            error.append(caught.value)
            with pytest.raises(ClientError) as caught:
                client(f"push(Path('{output}'), '{REPO}')")
            error.append(caught.value)
        client.close()
        texts = [text for one in error for text in (one.text, one.trace, *one.parts.values())]
        texts.append(client.errors.read_text())
        for text in texts:
            assert not re.search(r"secretsecret|passw0rd|abc123|Bearer", text), text


def test_the_librarys_own_log_holds_no_secret(hub, connect, output):
    client = connect(hub, HF_TOKEN=TOKEN)
    hub.faults = during(Fault(status=503), "PUT", times=1)
    client(f"push(Path('{output}'), '{REPO}')")
    client.close()
    text = client.errors.read_text()
    assert hub.asked("PUT")[0].query == {"X-Amz-Signature": "signed"}
    assert "503" in text and "PUT" in text and "signed" not in text


def test_the_librarys_bars_are_off_unless_asked_for(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    enable_progress_bars()
    with quiet_library():
        assert are_progress_bars_disabled()
    assert not are_progress_bars_disabled()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    with quiet_library():
        assert not are_progress_bars_disabled()


def test_a_token_reaches_neither_origin_nor_receipt(connect, output):
    with Hub(token=TOKEN) as hub:
        client = connect(hub, HF_TOKEN=TOKEN)
        done = client(f"push(Path('{output}'), '{REPO}')")
        origin = client(f"HubFolder(parse('{REPO}')).origin")
        assert TOKEN not in repr((done, origin)) and hub.asked()[0].token == TOKEN
        client.close()
