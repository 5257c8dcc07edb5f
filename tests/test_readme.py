"""The README shows what is: its tables come from results/*.json, its commands and records are the scripts' own."""
import json
import re
import shlex
import sys

from conftest import ROOT, load_stage

README = (ROOT / "README.md").read_text("utf-8")


def test_tables_are_those_of_the_result_files():
    sys.path.insert(0, str(ROOT / "bench"))
    from readme_tables import fill
    assert fill(README) == README


def test_commands_use_flags_that_exist():
    commands = re.findall(r"^(?:python|torchrun --nproc-per-node \d+) (0\d\w+\.py) (.*)$", README, re.M)
    assert commands
    for script, arguments in commands:
        load_stage(script.removesuffix(".py")).build_parser().parse_args(shlex.split(arguments))


def test_make_variables_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for line in re.findall(r"^make (.*)$", README, re.M):
        for word in shlex.split(line.split("#")[0]):
            name, _, value = word.partition("=")
            assert re.search(rf"^{name} \?=" if value else rf"(^|\s){name}(\s|:)", makefile, re.M), word


def test_records_are_valid(tmp_path):
    from common import parse_query
    lines = re.findall(r"```json\n(.*?)\n```", README, re.S)
    assert lines
    for line in lines:
        json.loads(line)
        parse_query("README.md", 1, line.encode())
