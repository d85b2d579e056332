"""A stand-in for the hub's HTTP API on this machine: repositories in memory, each request kept."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


@dataclass
class Repository:
    """Commits are snapshots: files by path."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files, branch="main"):
        """Add a commit of exactly these files."""
        commit = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit

    def at(self, revision):
        """Return the commit of a branch, a tag or a commit's own name."""
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """What lies on the hub, and what came over the wire."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    address: str = ""

    def repository(self, repo_id, **facts):
        """Make a repository with an empty first commit."""
        repository = self.repositories[repo_id] = Repository(**facts)
        repository.commit({".gitattributes": b""})
        return repository

    def files(self, repo_id, revision="main"):
        """Return the files of a revision, without the hub's own."""
        repository = self.repositories[repo_id]
        commit = repository.at(revision)
        assert commit is not None
        return {k: v for k, v in repository.commits[commit].items() if k != ".gitattributes"}

    def received_bytes(self):
        """Return all bodies that came in, as sent and with the content of files decoded."""
        parts = list(self.received)
        for repository in self.repositories.values():
            for files in repository.commits.values():
                parts += [*map(str.encode, files), *files.values()]
        return b"\0".join(parts)


class Refused(Exception):
    """An answer of the hub that is an error."""

    def __init__(self, status, code="", text="no", url=""):
        super().__init__(status, code, {"error": text, "url": url})


class Handler(BaseHTTPRequestHandler):
    """Answers as huggingface.co does, as far as this program asks."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        """Write nothing."""

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.hub.received.append(f"{path}\0{self.headers}\0".encode() + body)
        try:
            status, headers, content = self.reply(path, body)
        except Refused as error:
            status, code, words = error.args
            headers = {"X-Error-Code": code, "X-Error-Message": words["error"]}
            content = json.dumps(words).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply(self, path, body):
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.json(self.create(json.loads(body)))
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if words[:2] == ["api", "models"]:
            repo_id, rest = "/".join(words[2:4]), words[4:]
            repository = self.repository(repo_id)
            if self.command == "POST":
                self.writer()
                return self.json(self.change(repo_id, repository, rest, body))
            return self.json(self.describe(repo_id, repository, rest))
        if words[2:3] != ["resolve"]:
            raise Refused(404)
        repo_id, revision, name = "/".join(words[:2]), words[3], "/".join(words[4:])
        repository = self.repository(repo_id)
        commit = self.commit(repository, revision)
        content = repository.commits[commit].get(name)
        if content is None:
            raise Refused(404, "EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return 200, {"X-Repo-Commit": commit, "ETag": etag}, content

    def json(self, content):
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def logged_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def writer(self):
        if not self.logged_in():
            raise Refused(401, text="Invalid username or password.")

    def repository(self, repo_id):
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.logged_in()):
            raise Refused(404 if self.logged_in() else 401, "RepoNotFound")
        return repository

    def commit(self, repository, revision):
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound")
        return commit

    def create(self, asked):
        self.writer()
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.address}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise Refused(409, text="You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repository(repo_id, private=private)
        return {"url": url}

    def describe(self, repo_id, repository, rest):
        if rest[:1] == ["tree"]:
            files = repository.commits[self.commit(repository, rest[1])]
            return [
                {"type": "file", "path": name, "size": len(content), "oid": name}
                for name, content in files.items()
            ]
        commit = self.commit(repository, rest[1] if rest else "main")
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        facts = {"id": repo_id, "sha": commit, "private": repository.private}
        return {**facts, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def change(self, repo_id, repository, rest, body):
        kind, revision = rest[0], rest[1]
        if kind == "branch":
            if revision in repository.refs:
                raise Refused(409)
            repository.refs[revision] = repository.refs["main"]
            return {}
        if kind == "preupload":
            asked = json.loads(body)["files"]
            facts = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": each["path"], **facts} for each in asked]}
        assert kind == "commit"
        files = dict(repository.commits[self.commit(repository, revision)])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commit = repository.commit(files, revision)
        url = f"{self.hub.address}/{repo_id}/commit/{commit}"
        return {"commitUrl": url, "commitOid": commit, "success": True}


@contextmanager
def hub_on_this_machine(cache, patch):
    """Serve an empty hub, logged in, with its cache in ``cache``, for as long as the block runs."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    template = "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
