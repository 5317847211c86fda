"""A model as judge, over HTTP against a small server of our own: what is asked, recorded, priced, refused; sweeps the whole way."""

import http.server
import json
import re
import threading

import numpy as np
import pandas as pd
import pytest
import tiny

from steerkit.concept import concepts
from steerkit.engine.generate import Arm, Sampling, Work
from steerkit.engine.steer import Add
from steerkit.judges import Panel, api, panel, rubrics
from steerkit.scores import axbench
from steerkit.scores.bcs import Protocol, sweep
from steerkit.vectors import SteeringVector


class Stub(http.server.BaseHTTPRequestHandler):
    """Answer chat completions with what `server.reply(body)` gives: a text, or a status number."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        answer = self.server.reply(body)
        status = answer if isinstance(answer, int) else 200
        payload = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(api.KEY_VARIABLE, "secret-word")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.seen, server.reply = [], lambda body: '{"score": 7}'
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judge(server, rubric, cassette, *, max_calls=100, **options) -> api.ApiJudge:
    place = api.Endpoint(server.url, "stub-model", **{"retries": 0, "pause": 0.01, "workers": 2, **options})
    return api.ApiJudge(rubric, api.Answers(place, cassette, max_calls))


# one judge


def test_answers_are_rescaled_recorded_and_replayed(stub, tmp_path, monkeypatch):
    stub.reply = lambda body: json.dumps({"score": 10 if "angry" in body["messages"][1]["content"] else 4})
    tape = tmp_path / "deep" / "tape.jsonl"
    texts, prompts = ["angry text", "calm text", "angry text"], ["I think"] * 3
    asked = judge(stub, rubrics.behaviour("Text is angry."), tape)
    np.testing.assert_allclose(asked(texts, prompts), [1, 1 / 3, 1])
    assert len(stub.seen) == 2, "one call for each distinct text"
    path, authorization, body = stub.seen[0]
    assert path == "/v1/chat/completions" and authorization == "Bearer secret-word"
    assert body["model"] == "stub-model" and body["temperature"] == 0 and "I think" in body["messages"][1]["content"]
    assert "secret-word" not in tape.read_text(), "the key is not recorded"
    monkeypatch.delenv(api.KEY_VARIABLE)
    stub.url = "http://127.0.0.1:9/v1"
    np.testing.assert_allclose(judge(stub, rubrics.behaviour("Text is angry."), tape)(texts, prompts), [1, 1 / 3, 1])
    assert len(stub.seen) == 2


def test_neither_recording_nor_key_states_the_price(stub, tmp_path, monkeypatch):
    monkeypatch.delenv(api.KEY_VARIABLE)
    asked = judge(stub, rubrics.axbench_fluency(), tmp_path / "none.jsonl", price_in=1000.0, price_out=10000.0, max_tokens=100)
    texts = ["a" * 400, "b" * 401]
    tokens = round(sum(len(m["content"]) for b in asked.bodies(texts) for m in b["messages"]) / 4)
    with pytest.raises(PermissionError, match=r"2 of 2 requests") as caught:
        asked(texts)
    assert f"about {tokens:,} tokens in and at most 200 out: at most about {tokens / 1000 + 2:.4f} USD" in str(caught.value)
    assert api.KEY_VARIABLE in str(caught.value) and not stub.seen and not (tmp_path / "none.jsonl").exists()


def test_the_key_depends_on_all_that_changes_an_answer():
    def key(text="t", prompt="p", rubric=None, model="m", **options):
        place = api.Endpoint("http://127.0.0.1:9/v1", model, **options)
        return api.cassette_key(api.request_body(rubric or rubrics.behaviour("x"), place, text, prompt))

    others = [key("u"), key(prompt="q"), key(temperature=0.5), key(max_tokens=9), key(model="n"), key(rubric=rubrics.coherence())]
    assert len({key(), *others}) == 7 and key() == key(retries=9, workers=1)


def test_a_half_written_last_line_is_dropped_and_mended(stub, tmp_path):
    tape = tmp_path / "tape.jsonl"
    asked = lambda texts: judge(stub, rubrics.coherence(), tape)(texts)  # noqa: E731
    asked(["one", "two"])
    whole = tape.read_bytes()
    tape.write_bytes(whole[:-20])
    assert len(api.read_cassette(tape)) == 1
    np.testing.assert_allclose(asked(["one", "two", "three"]), [6 / 9] * 3)
    assert len(stub.seen) == 4 and len(tape.read_text().splitlines()) == 3
    assert all(set(json.loads(line)) == {"key", "model", "reply"} for line in tape.read_text().splitlines())
    tape.write_bytes(b"broken\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        asked(["one"])


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (503, 3)])
def test_what_was_answered_before_a_failure_is_kept(stub, tmp_path, status, tries):
    stub.reply = lambda body: status if "bad" in body["messages"][1]["content"] else '{"score": 1}'
    tape = tmp_path / "tape.jsonl"
    with pytest.raises(RuntimeError, match=rf"HTTP {status}.*STEERKIT_API_KEY, then run again.*kept in .*tape") as caught:
        judge(stub, rubrics.coherence(), tape, workers=1, retries=2)(["good", "bad"])
    assert len(api.read_cassette(tape)) == 1 and len(stub.seen) == 1 + tries and "secret-word" not in str(caught.value)
    stub.reply = lambda body: '{"score": 10}'
    np.testing.assert_allclose(judge(stub, rubrics.coherence(), tape)(["good", "bad"]), [0, 1])


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(stub, tmp_path, status):
    stub.reply = lambda body: status if len(stub.seen) < 3 else '{"score": 10}'
    assert judge(stub, rubrics.coherence(), tmp_path / "t", retries=2)(["x"])[0] == 1
    assert len(stub.seen) == 3


@pytest.mark.parametrize("reply", ["", "no score", '{"score": 11}', '{"score": 4.5}', '{"mark": 3}', "[1]", '{"score": null}', None])
def test_few_replies_without_a_score_count_zero_and_many_are_an_error(stub, tmp_path, capsys, reply):
    stub.reply = lambda body: reply if "odd" in body["messages"][1]["content"] else '{"score": 10}'
    asked = judge(stub, rubrics.coherence(), tmp_path / "t")
    with pytest.raises(ValueError, match="coherence: expected scores from 1 to 10, got 1 of 2 replies of stub-model without one"):
        asked(["odd", "even"])
    np.testing.assert_array_equal(asked(["odd", *["even"] * 19]), [0] + [1] * 19)
    assert "1 of 20 replies" in capsys.readouterr().out and len(stub.seen) == 2


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Fine.\nRating: [[2]]", 1), ("Rating: 0\nno...\nRating: **1**.", 0.5), ("Rating: [[3]]", np.nan), ("2", np.nan),
     ('Rating: "0"', 0), ("Rating: [[1.5]] ", 0.75), ("Rating: nan", np.nan)],
)  # fmt: skip
def test_axbench_ratings(reply, score):
    np.testing.assert_equal(rubrics.read_score(rubrics.axbench_fluency(), reply), score)


# a panel


def graded(text: str, criterion: str) -> int:
    """The server's opinion of a text, 1 to 10."""
    return 1 + (len(text) + len(criterion)) % 10


def rated(text: str, instruction: str = "") -> int:
    """The server's rating of a text, 0 to 2."""
    return (len(text) + len(instruction)) % 3


def saets_server(body):
    system, user = (message["content"] for message in body["messages"])
    criterion, text = re.search(r"Criterion: (.*)\.$", system)[1], re.search(r'Completion:\n"""(.*)"""$', user, re.DOTALL)[1]
    return json.dumps({"score": graded(text, criterion)})


def axbench_server(body):
    (content,) = (message["content"] for message in body["messages"])
    text = re.search(r"\[Start of the sentence fragment\]\n(.*)\n\[End of the sentence fragment\]$", content, re.DOTALL)[1]
    asked = re.search(r"\[Instruction\]\n(.*?)\n\n", content, re.DOTALL) or re.search(r"fragment below: (.*)\. Ignore grammar", content)
    return f"So it seems.\nRating: [[{rated(text, asked[1] if asked else '')}]]"


@pytest.fixture
def swept():
    """A sweep of two topics on a tiny model, judged by whoever is given."""
    model, tok = tiny.model("llama"), tiny.tokenizer()
    head = model.get_output_embeddings().weight.detach()
    by_topic = {t: [SteeringVector("M", head[i], 2, "tiny")] for t, i in (("love", 70), ("french", 80))}
    protocol = Protocol(("So", "Now"), (0.0, 30.0), 4, Sampling(max_new_tokens=6, top_k=50, top_p=0.3))
    lab = tiny.lab(hf=model, tok=tok)
    return lambda judges: sweep(lab, by_topic, protocol=protocol, judges=judges, work=Work(progress=False))


def test_a_sweep_is_judged_by_a_model_and_then_from_the_cassette(stub, swept, tmp_path, monkeypatch, capsys):
    said = []
    stub.reply = lambda body: said.append(capsys.readouterr().out) or saets_server(body)
    spec, tape = f"api:tiny@{stub.url}", tmp_path / "tape.jsonl"
    judged = swept(panel(spec, cassette=tape, workers=1))
    assert len(judged) == 2 * 2 * 2 * 4 and judged.behaviour.nunique() > 3
    for row in judged.itertuples():
        criterion = concepts()[row.topic].criterion.rstrip(".")
        assert row.behaviour == pytest.approx((graded(row.prompt + row.text, criterion) - 1) / 9)
        assert row.coherence == pytest.approx((graded(row.prompt + row.text, "The text is coherent and its grammar is correct") - 1) / 9)
    pairs = judged.drop_duplicates(["prompt", "text"])
    calls = len(pairs) + len(judged.drop_duplicates(["topic", "prompt", "text"]))
    assert len(stub.seen) == calls  # each pair once, and the unsteered ones once for each topic
    found = re.search(r"judge: (\d+) calls to tiny, about [\d,]+ tokens in and at most ([\d,]+) out: at most about 0\.\d+ USD", said[0])
    assert int(found[1]) == calls and int(found[2].replace(",", "")) == 150 * calls  # said before the first request, for all of them
    assert not any("judge: " in later and "USD" in later for later in said[1:])
    stub.shutdown()
    stub.server_close()
    monkeypatch.delenv(api.KEY_VARIABLE)
    pd.testing.assert_frame_equal(swept(panel(spec, cassette=tape, max_calls=0)), judged)  # what is recorded does not count
    assert "USD" not in capsys.readouterr().out and len(stub.seen) == calls


def test_too_many_calls_are_refused_before_the_server_is_asked(stub, swept, tmp_path):
    with pytest.raises(ValueError, match=r"expected at most 3 calls, got \d+ calls to tiny, about .* USD.*; raise max_calls or judge"):
        swept(panel(f"api:tiny@{stub.url}", cassette=tmp_path / "tape.jsonl", max_calls=3))
    assert not stub.seen and not (tmp_path / "tape.jsonl").exists()
    twice = judge(stub, rubrics.coherence(), tmp_path / "tape.jsonl", max_calls=3)
    twice(["one", "two"])
    twice(["one", "two", "three"])  # only the third is asked
    with pytest.raises(ValueError, match=r"at most 3 calls, got 1 calls to stub-model.* after 3 made before; raise max_calls"):
        twice(["four"])
    assert len(stub.seen) == 3


def test_axbench_is_judged_by_its_own_rubrics(stub, tmp_path):
    stub.reply = axbench_server
    lab, instructions = tiny.lab(), ["Why?", "Who is it?", "When was that?"]
    row = lab.hf.get_output_embeddings().weight.detach()[70]
    arms = [Arm("x", Add(2, row, 30.0), 30.0, {"topic": "love"}), Arm("plain", labels={"topic": "french"})]
    judges = panel(f"api:m@{stub.url}", rubric="axbench", cassette=tmp_path / "tape.jsonl")
    texts = axbench.steer(lab, arms, instructions, sampling=Sampling(max_new_tokens=6), work=Work(progress=False))
    texts = axbench.judged(texts, judges, work=Work(progress=False))
    assert len(texts) == 6 and set(texts.prompt) == set(instructions)
    for found in texts.itertuples():
        topic, text = concepts()[found.topic], found.text
        about = f"{topic.title}. {topic.criterion.rstrip('.')}"
        assert (found.concept, found.instruct, found.fluency) == (rated(text, about), rated(text, found.prompt), rated(text))
    assert judges.in_words("words like: rain, wind")(["a wet day"])[0] == rated("a wet day", "words like: rain, wind") / 2


def test_who_judges_is_read_strictly(tmp_path):
    place = panel("api:org/model@20240620@https://host.example:8443/v1", timeout=5.0).coherence.answers.endpoint
    assert (place.model, place.base_url, place.timeout) == ("org/model@20240620", "https://host.example:8443/v1", 5.0)
    for spec in ("", "online", "api:model", "api:@https://x/v1", "api:model@ftp://x/v1"):
        with pytest.raises(ValueError, match=r'judge: expected "offline", "second" or "api:MODEL@URL"'):
            panel(spec)
    with pytest.raises(ValueError, match=r"rubric: expected one of \['sae_ts', 'axbench'\], got 'fgaa'"):
        panel("api:m@http://x/v1", rubric="fgaa")
    with pytest.raises(ValueError, match="got 'lodnon'"):
        panel("api:m@http://x/v1").concept("lodnon")
    assert isinstance(panel(), Panel)
