import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lmcore.errors import UserError
from weightwatch.labelling import Endpoint, Question, label

QUESTIONS = [Question(f"D0_u{i} user high", ((f"text number {i} ", "end"), ("another", " one"))) for i in range(6)]


class Server(ThreadingHTTPServer):
    """A chat endpoint on the loopback; `answers(number, question)` gives status, headers and body of request number 0, 1, ..."""

    daemon_threads = True

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.headers, self.paths, self.lock = answers, [], [], [], threading.Lock()

    def handle_error(self, request, client_address):
        pass  # of a client that did not wait for the answer

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(question)
            self.server.headers.append(dict(self.headers))
            self.server.paths.append(self.path)
        status, headers, body = self.server.answers(number, question)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def says(text):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def serve():
    servers = []

    def start(answers):
        servers.append(Server(answers))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def echo(number, question):
    """Answers with the number of the text that was asked about."""
    return says("about text " + question["messages"][1]["content"].split("text number ")[1][0])


def test_each_question_gets_its_own_answer(serve, tmp_path):
    server = serve(echo)
    labels = label(QUESTIONS, Endpoint(url=server.url, model="small"), tmp_path / "labels.jsonl")
    assert labels == {one.name: f"about text {i}" for i, one in enumerate(QUESTIONS)}
    assert {question["model"] for question in server.asked} == {"small"}
    assert set(server.paths) == {"/v1/chat/completions"}
    assert "text number 0 >>>end<<<" in "".join(question["messages"][1]["content"] for question in server.asked)


def test_answers_are_cut_to_ten_words_in_one_line(serve, tmp_path):
    server = serve(
        lambda number, question: says(
            '<think>\nwell\n</think>\n"One two three four five six seven eight nine ten eleven."\nMore.'
        )
    )
    labels = label(QUESTIONS[:1], Endpoint(url=server.url, model="m"), tmp_path / "labels.jsonl")
    assert labels == {QUESTIONS[0].name: "One two three four five six seven eight nine ten"}


def test_what_was_answered_is_not_asked_again(serve, tmp_path):
    path = tmp_path / "labels.jsonl"
    server = serve(lambda number, question: echo(number, question) if number < 3 else (400, {}, b"no more"))
    endpoint = Endpoint(url=server.url, model="m", workers=1)
    with pytest.raises(UserError, match="status 400: no more"):
        label(QUESTIONS, endpoint, path)
    assert len(path.read_text().splitlines()) == 3
    with open(path, "a") as file:
        file.write('{"name": "D0_u3 us')  # what a kill leaves
    server.answers = echo
    before = len(server.asked)
    assert label(QUESTIONS, endpoint, path) == {one.name: f"about text {i}" for i, one in enumerate(QUESTIONS)}
    assert len(server.asked) - before == 3
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == [one.name for one in QUESTIONS]


def test_other_texts_or_another_model_are_asked_about_anew(serve, tmp_path):
    server = serve(echo)
    path = tmp_path / "labels.jsonl"
    label(QUESTIONS, Endpoint(url=server.url, model="a"), path)
    label(QUESTIONS, Endpoint(url=server.url, model="b"), path)
    changed = Question(QUESTIONS[0].name, (("text number 9 ", "end"),))
    labels = label([changed, *QUESTIONS[1:]], Endpoint(url=server.url, model="b"), path)
    assert len(server.asked) == 13
    assert labels[changed.name] == "about text 9"


@pytest.mark.parametrize("first", [(503, {}, b"busy"), (429, {"Retry-After": "0"}, b"slow down")], ids=["busy", "too many"])
def test_an_endpoint_that_says_to_come_back_is_asked_again(serve, tmp_path, first):
    server = serve(lambda number, question: first if number < 2 else echo(number, question))
    labels = label(QUESTIONS[:1], Endpoint(url=server.url, model="m", pause=0.01), tmp_path / "labels.jsonl")
    assert labels == {QUESTIONS[0].name: "about text 0"}
    assert len(server.asked) == 3


def test_an_endpoint_that_never_answers_is_given_up(serve, tmp_path):
    release = threading.Event()
    server = serve(lambda number, question: (release.wait(5), {}, b"")[1:] and says("late"))
    with pytest.raises(UserError, match=r"no answer in 2 tries .*timed out"):
        label(QUESTIONS[:1], Endpoint(url=server.url, model="m", timeout=0.1, tries=2, pause=0.01), tmp_path / "labels.jsonl")
    release.set()
    assert len(server.asked) == 2


def test_an_endpoint_that_is_not_there_is_given_up(tmp_path):
    with pytest.raises(UserError, match="no answer in 2 tries"):
        Endpoint(url="http://127.0.0.1:1/v1", model="m", tries=2, pause=0.01).ask((("a", "b"),))


def test_the_key_comes_from_the_environment_and_stays_out_of_files(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("LABELS_KEY", "secret-key")
    server = serve(echo)
    label(QUESTIONS, Endpoint(url=server.url, model="m", key_variable="LABELS_KEY"), tmp_path / "labels.jsonl")
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret-key"}
    assert "secret-key" not in (tmp_path / "labels.jsonl").read_text()
    monkeypatch.delenv("LABELS_KEY")
    with pytest.raises(UserError, match="LABELS_KEY, which is to hold the key of the endpoint, is not set"):
        Endpoint(url=server.url, model="m", key_variable="LABELS_KEY")


def test_without_a_key_none_is_sent(serve, tmp_path):
    server = serve(echo)
    label(QUESTIONS[:1], Endpoint(url=server.url, model="m"), tmp_path / "labels.jsonl")
    assert "Authorization" not in server.headers[0]


def test_a_key_does_not_follow_a_redirect(serve, monkeypatch):
    monkeypatch.setenv("LABELS_KEY", "secret-key")
    elsewhere = serve(echo)
    server = serve(lambda number, question: (302, {"Location": elsewhere.url}, b""))
    with pytest.raises(UserError, match="status 302"):
        Endpoint(url=server.url, model="m", key_variable="LABELS_KEY").ask((("a", "b"),))
    assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, b"who are you"), "status 401: who are you .set --endpoint-key"),
        ((200, {}, b"<html>"), "no JSON"),
        ((200, {}, b"[]"), "did not answer like a chat endpoint: \\[\\]"),
        ((200, {}, b'{"choices": []}'), "did not answer like a chat endpoint"),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), "did not answer like a chat endpoint"),
    ],
    ids=["no key", "a web page", "a list", "no choice", "no content"],
)
def test_an_answer_that_is_no_label_is_an_error_that_says_so(serve, answer, message):
    server = serve(lambda number, question: answer)
    with pytest.raises(UserError, match=message):
        Endpoint(url=server.url, model="m").ask((("a", "b"),))


def test_addresses_and_numbers_that_cannot_be_used_are_refused():
    with pytest.raises(UserError, match="no address such as"):
        Endpoint(url="localhost:8000", model="m")
    with pytest.raises(UserError, match="must be above 0"):
        Endpoint(url="http://localhost/v1", model="m", tries=0)


def test_a_damaged_label_file_names_the_line(tmp_path):
    (tmp_path / "labels.jsonl").write_text('{"name": "a"}\n')
    with pytest.raises(UserError, match=r"labels\.jsonl, line 1"):
        label(QUESTIONS, Endpoint(url="http://127.0.0.1:1/v1", model="m"), tmp_path / "labels.jsonl")
