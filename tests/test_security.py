"""Tests of SECURITY.md: what a hostile checkpoint, text, store or address cannot do, and where secrets do not
appear."""

import ast
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub
from fake_model import fake_capture, store_files, words
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from patience import HUNG_S
from s3_server import bucket_files, new_store, server_address  # noqa: F401

from analysis.explorer.index import CaptureIndex
from analysis.explorer.one_file import export_page
from analysis.explorer.site import HEADERS
from analysis.explorer.view import View
from analysis.report.page import write_report
from jobs import report, status
from jobs.capturing.options import CaptureConfig
from jobs.capturing.run import Run
from jobs.sources.resolve import Document, Source, group_name, resolve_source
from store import CaptureGroup
from store.group import valid_name
from store.secrets import without_secrets
from workers.models.checkpoint import weight_files
from workers.models.loading import describe_model, load_model
from workers.replica import Assignment
from workers.text.tokenizer import load_tokenizer
from workers.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]
PACKAGES = ("store", "workers", "jobs", "analysis")
SECRET = "s3cr3t-Xq7ZpQ0vT1"
Command = Callable[..., Any]


class Touch:
    """Creates a file when its pickle is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def test_the_pickle_that_must_not_be_loaded_would_be_noticed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touch(tmp_path / "touched"))).close()
    assert (tmp_path / "touched").exists()


# --- No code out of data: our own -------------------------------------------------------------------------

UNPICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
EVALUATES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    ("torch", "load"): "unpickles",
    ("os", "system"): "starts a shell",
    ("os", "popen"): "starts a shell",
    ("yaml", "unsafe_load"): "makes objects",
    ("yaml", "full_load"): "makes objects",
}
NEEDED = {
    "from_pretrained": ("Auto", "trust_remote_code", "False"),
    "from_config": ("Auto", "trust_remote_code", "False"),
    "load": ("np", "allow_pickle", "False"),
    "Environment": ("jinja2", "autoescape", "True"),
}
"""A method: the start of the expression on which it is called, and a required argument with its value."""


def dangers(source: str) -> list[str]:
    """Parts of a module that could run code from data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.partition(".")[0] in UNPICKLES]
        if isinstance(node, ast.Call):
            found += dangers_of_call(node)
    return found


def dangers_of_call(call: ast.Call) -> list[str]:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    owner, _, name = ast.unparse(call.func).rpartition(".")
    found = [f"calls {name}"] if not owner and name in EVALUATES else []
    found += [f"{owner}.{name} {CALLS[owner, name]}"] if (owner, name) in CALLS else []
    found += [
        f"{key}={given[key]}" for key in ("trust_remote_code", "allow_pickle", "shell") if given.get(key) == "True"
    ]
    found += ["yaml.load makes objects"] if (owner, name) == ("yaml", "load") and "BaseLoader" not in str(given) else []
    begins, key, value = NEEDED.get(name, ("\0", "", ""))
    if owner.rpartition(".")[2].startswith(begins) and given.get(key) != value:
        found.append(f"{owner}.{name} without {key}={value}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_unpickles_evaluates_or_trusts_code_of_others(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    assert {module.name: dangers(module.read_text()) for module in modules if dangers(module.read_text())} == {}


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import ray.x, cloudpickle", "eval(x)", "exec('1')"),
        *("np.load(f)", "np.load(f, allow_pickle=True)", "torch.load(f)", "os.system('x')"),
        *("yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)", "yaml.unsafe_load(t)"),
        *("transformers.AutoModel.from_pretrained(f)", "AutoConfig.from_pretrained(f, trust_remote_code=True)"),
        *("subprocess.run('x', shell=True)", "jinja2.Environment(loader=l)", "jinja2.Environment(autoescape=False)"),
    ],
)  # fmt: skip
def test_the_search_finds_each_danger(line: str) -> None:
    assert dangers(line)


def test_no_template_turns_escaping_off() -> None:
    templates = [*(ROOT / "analysis").rglob("*.jinja")]
    assert len(templates) > 5
    for template in templates:
        assert not re.search(r"\|\s*safe|autoescape|Markup", template.read_text()), template


def test_no_page_s_policy_lets_text_become_a_script(captured: Path) -> None:
    view = View(str(captured), "fake", CaptureIndex(str(captured), "fake", captured.parent / "index").now)
    write_report([captured], captured.parent / "r.html")
    pages = [export_page(view, [0]), (captured.parent / "r.html").read_text()]
    policies = [HEADERS["Content-Security-Policy"]]
    policies += [re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1] for page in pages]  # type: ignore[index]
    for policy in policies:
        scripts = next(part for part in policy.split(";") if "script-src" in part)
        assert "default-src 'none'" in policy.replace("&#39;", "'")
        assert "unsafe" not in scripts
        assert "*" not in scripts


# --- No code out of data: checkpoints ---------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint, to be made hostile."""
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("kind", ["mixtral", "evil"])
def test_code_that_a_checkpoint_brings_is_never_run(model: Path, tmp_path: Path, kind: str) -> None:
    code = f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Evil: ..."
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    classes = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    change(model / "config.json", auto_map=classes, model_type=kind)
    tokens = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    change(model / "tokenizer_config.json", auto_map=tokens, tokenizer_class="Evil")
    assert load_tokenizer(model).encode_batch(["a"])[0].size
    if kind == "evil":
        with pytest.raises(ValueError, match=r"cannot build the model of .*config\.json"):
            describe_model(model, quantization="none", device_type="cpu")
    else:
        assert load_model(model, quantization="none", device="cpu").num_experts == 8
    assert not (tmp_path / "touched").exists()


def test_a_pickled_checkpoint_is_refused_and_not_loaded(model: Path, tmp_path: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(ValueError, match="only safetensors weights are read"):
        load_model(model, quantization="none", device="cpu")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", 5, "a\0b"])
def test_an_index_names_files_beside_it_only(model: Path, name: Any) -> None:
    (model.parent / "elsewhere.safetensors").write_bytes(b"")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="must name files in its own folder"):
        weight_files(model)


TEMPLATES = {
    "reaches for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "runs for ever": "{% for i in range(10**12) %}{{ i }}{% endfor %}",
    "divides by nothing": "{{ 1 // 0 }}",
    "is broken": "{% for %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_runs_in_a_sandbox_and_its_failure_is_told(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"the chat template of .* rejects the messages"):
        load_tokenizer(model).chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{}", "is not a supported tokenizer"),
        ("tokenizer.json", "\0", "is not a supported tokenizer"),
        ("tokenizer_config.json", "[1]", "holds list, but must hold a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_a_tokenizer_that_is_none_is_refused_by_its_file_s_name(
    model: Path, name: str, content: str, said: str
) -> None:
    (model / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} {said}"):
        load_tokenizer(model)


# --- No code out of data: data sets -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_pickle_in_the_type_of_a_column_is_not_loaded(tmp_path: Path, kind: str) -> None:
    pickled = pickle.dumps(Touch(tmp_path / "touched"))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled}
    for name in ("arrow.py_extension_type", "ray.data.arrow_pickled_object", "ray.data.arrow_tensor"):
        field = pa.field("other", pa.binary(), metadata={**metadata, "ARROW:extension:name": name})
        table = pa.table([["one"], [pickled]], schema=pa.schema([pa.field("text", pa.string()), field]))
        place = tmp_path / f"{name}.parquet"
        if kind == "parquet":
            pq.write_table(table, place)
        else:
            place = tmp_path / name
            datasets.Dataset(pa.table({"text": ["one"], "other": [b"x"]})).save_to_disk(str(place))
            with pa.OSFile(str(next(place.glob("*.arrow"))), "w") as sink, pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table)
        assert [document.text for document in resolve_source(str(place)).documents()] == ["one"]
    assert not (tmp_path / "touched").exists()


def test_a_driver_on_a_cluster_knows_no_type_that_unpickles(tmp_path: Path) -> None:
    script = (
        "import jobs.cluster.ray_workers, sys; print([name for name in sys.modules if name.startswith('ray.data')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=HUNG_S)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_script_among_a_hub_s_data_is_refused_and_not_run(tmp_path: Path) -> None:
    assert int(datasets.__version__.partition(".")[0]) >= 4, "before, scripts could be run"
    files = {"data.jsonl": b'{"text": "one"}\n', "words.py": f"open({str(tmp_path / 'touched')!r}, 'w')".encode()}
    read = "from jobs.sources.resolve import resolve_source\n"
    read += "print([d.text for d in resolve_source('org/words').documents()])"
    with FakeHub({"datasets/org/words": files}) as hub:
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", read]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HUNG_S)
    assert "scripts are no longer supported, but found words.py" in done.stderr
    assert not (tmp_path / "touched").exists()


# --- Nothing leaves the store -----------------------------------------------------------------------------

LOOK_ALIKES = [
    "．．",
    "‥",
    "a∕b",
    "a／b",
    "a⁄b",
    "a\\b",
    "a%2fb",
    "a\0b",
    "a\u202eb",
    "ａ",
    "Kelvin",
    "ı",
    "a\u0301",
    "..",
    "a/..",
    "con\n",
]


@pytest.mark.parametrize("name", [*LOOK_ALIKES, "K", "a\r", " a", "a ", "~", "-/../x", "c:"])
def test_a_name_that_only_looks_like_one_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid name of a data set"):
        CaptureGroup(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=12) | st.text(alphabet="./\\-_~a\0．／∕K ", max_size=8))
def test_a_name_that_is_taken_is_one_plain_folder_of_the_store(name: str) -> None:
    try:
        valid_name(name)
    except ValueError:
        return
    assert name.isascii()
    assert Path(os.path.normpath(Path("/store") / name)).parent == Path("/store")


@given(st.text(max_size=12) | st.sampled_from(LOOK_ALIKES))
def test_a_name_made_from_a_path_or_a_hub_id_stays_in_the_store_or_is_refused(spec: str) -> None:
    name = group_name(f"org/{spec}")
    assert name == "zarr.json" or valid_name(name) == name
    assert "/" not in name


def test_a_link_in_a_store_is_not_emptied_by_what_removes_partial_files(captured: Path) -> None:
    outside = captured.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    shutil.rmtree(captured / "fake/token/partial", ignore_errors=True)
    (captured / "fake/token/partial").symlink_to(outside)
    (captured / "fake/expert/commits/0.json").unlink()
    fake_capture(captured, TEXTS)
    assert (outside / "kept").read_text() == "x"


@pytest.mark.parametrize("store", ["s3://user:password@bucket/x", "file:///etc", "http://x/y"])
def test_a_store_s_address_is_told_without_its_password(command: Command, store: str) -> None:
    ran = command(store, main=status.main)
    assert ran.status == 2
    assert "password" not in ran.err


def test_what_an_error_quotes_commands_no_terminal(command: Command) -> None:
    ran = command("no\x1b]0;title\x07such.zarr\x9b31m", main=status.main)
    assert ran.status == 2
    assert "no\\x1b]0;title\\x07such.zarr\\x9b31m" in ran.err
    assert not [character for character in ran.err if character != "\n" and not character.isprintable()]


def test_a_path_that_is_no_text_is_printed_all_the_same() -> None:
    script = "import jobs.console.terminal; jobs.console.terminal.run_job(lambda arguments: print(arguments[0]) or 0)"
    done = subprocess.run([sys.executable, "-c", script, b"a\xff"], cwd=ROOT, capture_output=True, timeout=HUNG_S)
    assert (done.returncode, done.stdout) == (0, b"a\\udcff\n"), done.stderr


# --- Secrets ----------------------------------------------------------------------------------------------

TEXTS = [words(9, 1), words(30, 2), ""]
SIGNED = f"https://user:{SECRET}@bucket.example/c4.txt?X-Amz-Signature={SECRET}&X-Amz-Credential=AKIA#x{SECRET}"


@pytest.fixture
def captured(tmp_path: Path) -> Path:
    fake_capture(tmp_path / "s.zarr", TEXTS)
    return tmp_path / "s.zarr"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets in the environment, as a job has them."""
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRET)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (SIGNED, "https://…@bucket.example/c4.txt?…"),
        (f"403 for url: {SIGNED}: denied", "403 for url: https://…@bucket.example/c4.txt?… denied"),
        (
            f"'{SIGNED}' and \"{SIGNED}\"",
            "'https://…@bucket.example/c4.txt?…' and \"https://…@bucket.example/c4.txt?…\"",
        ),
        (f"s3://AKIA:{SECRET}/+x@bucket/y", "s3://…@bucket/y"),
        (f"HTTP://{SECRET}@h", "HTTP://…@h"),
        ("http://h:8080/a?b", "http://h:8080/a?…"),
        (f"ftp://h/a.txt?key={SECRET} gone", "ftp://h/a.txt?… gone"),
        (f"abfs+https://h/a#{SECRET}", "abfs+https://h/a?…"),
        ("s3://bucket/run#1?.zarr", "s3://bucket/run#1?.zarr"),
        ("s3://bucket/routes.zarr, what? and you@example.org", "s3://bucket/routes.zarr, what? and you@example.org"),
        ("org/name:config texts/*.txt a?b#c", "org/name:config texts/*.txt a?b#c"),
    ],
)
def test_an_address_is_shown_without_user_and_query_and_all_else_as_it_is(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown).replace("??", "?") == shown


def test_a_secret_of_the_environment_is_shown_nowhere(secrets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_secrets(f"Authorization: Bearer {SECRET}.") == "Authorization: Bearer …."
    monkeypatch.setenv("HF_TOKEN", "a")
    assert without_secrets("a b") == "a b", "too short to be one"


def test_neither_print_config_nor_the_store_holds_a_secret_of_an_address(tmp_path: Path, secrets: None) -> None:
    config = CaptureConfig(
        dataset=(SIGNED,), local=True, model="tiny", quantization="none", device="cpu", store=str(tmp_path / "s.zarr")
    )
    assert SECRET not in config.as_yaml()
    documents = [Document(name="c4", text="one two three")]
    source = Source(name="c4", read=lambda start: iter(documents[start:]), identify=lambda: {"sha256": "0"})
    run = Run(config)
    run.open_group(run.prepare("c4", source))
    files = store_files(tmp_path / "s.zarr")
    assert (
        b"https://\xe2\x80\xa6@bucket.example" in files["c4/zarr.json"]
        or b"\\u2026@bucket.example" in files["c4/zarr.json"]
    )
    assert not [name for name, data in files.items() if SECRET.encode() in data]


@pytest.mark.parametrize(
    "address", [SIGNED, f"https://user:{SECRET}@host/x", f"ftp://user:{SECRET}@host/x?key={SECRET}"]
)
def test_an_address_that_is_no_data_set_is_refused_without_its_secrets(
    command: Command, tmp_path: Path, address: str
) -> None:
    asked = ("--local", "--model", "tiny", "--quantization", "none", "--device", "cpu", "--dataset", address)
    refused = command(*asked, "--store", tmp_path / "s.zarr")
    assert (refused.status, refused.out) == (2, "")
    assert "no data set '" in refused.err
    assert "…@" in refused.err
    assert "URLs are not supported; download the file and use its path" in refused.err
    assert SECRET not in refused.err


def test_what_travels_to_workers_shows_no_secret() -> None:
    assignment = Assignment(
        store="s",
        leases={},
        make_engine=dict,  # type: ignore[arg-type]
        device="cpu",
        batch_tokens=1,
        secrets={"HF_TOKEN": SECRET},
    )
    assert SECRET not in repr(assignment)


def test_no_byte_of_a_capture_on_s3_or_of_what_is_said_of_it_holds_a_key(
    s3: str, secrets: None, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.txt").write_text("one two three")
    options = ["--local", "--model", "tiny", "--device", "cpu", "--quantization", "none", "--sequence_length", 16]
    said = [command("--dataset", tmp_path / "t.txt", *options, "--store", s3)]
    said += [command(s3, "--verify", main=status.main), command(s3, "--json", main=status.main)]
    assert [ran.status for ran in said] == [0, 0, 0], said
    said += [command("--dataset", tmp_path / "t.txt", *options, "--store", s3, "--print_config")]
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.replace("//", f"//user:{SECRET}@"))
    said += [command("--dataset", tmp_path / "t.txt", *options, "--store", s3)]
    said += [command("s3://no-such-bucket/x.zarr", main=status.main)]
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert "//…@127.0.0.1" in said[-1].err, "its address is told, and would be with the password"
    assert not [ran for ran in said if SECRET in ran.out + ran.err]
    assert not [name for name, data in bucket_files(s3).items() if SECRET.encode() in data]


def test_a_report_holds_no_secret_of_the_environment(captured: Path, secrets: None, command: Command) -> None:
    page = captured.parent / "report.html"
    ran = command(captured, "-o", page, main=report.main)
    assert ran.status == 0
    assert SECRET not in ran.out + ran.err + page.read_text()
    assert not [name for name, data in store_files(captured.parent).items() if SECRET.encode() in data]


# --- Ray --------------------------------------------------------------------------------------------------

OWN = """
import json, os, ray, urllib.error, urllib.request
from pathlib import Path
from jobs.cluster.connection import connection
with connection():
    dashboard = ray._private.worker._global_node.webui_url
    try:
        urllib.request.urlopen(f"http://{dashboard}/api/jobs/").close()
        answer = 200
    except urllib.error.HTTPError as error:
        answer = error.code
    token = Path.home() / ".ray" / "auth_token"
    print(json.dumps([os.environ["RAY_AUTH_MODE"], dashboard, answer, token.stat().st_mode & 0o777]))
"""


@pytest.mark.slow
def test_a_ray_that_a_job_starts_asks_for_a_token_that_nobody_else_can_read(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    short = Path("/tmp") / f"ea{os.getpid()}"  # a socket's path has 107 characters
    short.mkdir()
    environment |= {"HOME": str(tmp_path), "RAY_TMPDIR": str(short), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", OWN], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HUNG_S
        )
    finally:
        shutil.rmtree(short, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    mode, dashboard, answer, rights = json.loads(done.stdout.splitlines()[-1])
    assert (mode, rights) == ("token", stat.S_IRUSR | stat.S_IWUSR)
    assert dashboard.startswith("127.0.0.1:")
    assert answer in (401, 403)


# --- What is installed ------------------------------------------------------------------------------------


def unpinned(lock: str) -> list[str]:
    """Lines of a lock file that use an address, or lack a version or hashes."""
    logical = [
        line for line in lock.replace("\\\n", " ").splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    pinned = re.compile(
        r"[a-z0-9][a-z0-9._-]*(\[[a-z0-9,._-]+\])?==\S+( ; [^@:]+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*"
    )
    return [line[:80] for line in logical if not pinned.fullmatch(line)]


def test_everything_that_is_installed_has_a_version_and_hashes_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert unpinned(lock) == []
    assert "://" not in lock
    assert "--require-hashes -r requirements.lock" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "a==1.0",
        "a>=1 --hash=sha256:" + "0" * 64,
        "a @ git+https://x",
        "--index-url https://x",
        "-e .",
        "a==1 --hash=md5:0",
    ],
)
def test_a_requirement_without_a_hash_or_with_an_address_is_found(line: str) -> None:
    assert unpinned(f"b==1 \\\n    --hash=sha256:{'0' * 64}\n    # via c\n{line}\n") == [line[:80]]


def test_each_dependency_is_locked_at_a_version_that_it_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    locked = dict(
        re.findall(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
