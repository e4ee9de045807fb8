"""Answers temper's requests, one JSON object a line, with a function of a user's file.

The function is called as verl calls it: (data_source=, solution_str=, ground_truth=, extra_info=). What it prints goes
to stderr, and its stdin is empty: requests and answers have file descriptors of their own.
"""

import asyncio
import importlib.util
import inspect
import json
import math
import os
import sys
import traceback


def private_streams():
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8", newline="\n")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, answers


def load(path, name):
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    module_name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None:
        raise ImportError(f"{path}: expected a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"{path} has no function {name}(data_source, solution_str, ground_truth, extra_info)")
    return function


def to_number(value):
    """A float of a number or of an array or tensor with one element; None of anything else."""
    if not isinstance(value, (bool, int, float)) and hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, (bool, int, float)) else None


def checked(what, number):
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}: expected a finite number")
    return number


def answer(function, request):
    extra_info = request["extra_info"]
    result = function(
        data_source=request["data_source"],
        solution_str=request["response"],
        ground_truth=request["ground_truth"],
        extra_info={} if extra_info is None else extra_info,
    )
    if inspect.isawaitable(result):
        result = asyncio.run(result)
    components = {}
    if isinstance(result, dict):
        if "score" not in result:
            raise KeyError(f"the dict has no 'score': it has {sorted(map(str, result))}")
        numbers = {str(key): to_number(value) for key, value in result.items() if key != "score"}
        components = {key: checked(key, number) for key, number in numbers.items() if number is not None}
        result = result["score"]
    score = to_number(result)
    if score is None:
        raise TypeError(f"the score is {result!r:.80} of type {type(result).__name__}: expected a number")
    return {"score": checked("the score", score), "components": components}


def describe(error, path):
    text = " ".join(traceback.format_exception_only(type(error), error)[-1].split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f" ({os.path.basename(path)}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return (text or type(error).__name__)[:1000] + where


def main():
    requests, answers = private_streams()
    path, name = sys.argv[1:3]

    def say(message):
        answers.write(json.dumps(message, allow_nan=False) + "\n")
        answers.flush()

    try:
        function = load(path, name)
    except BaseException as error:
        say({"ready": False, "error": describe(error, path)})
        sys.exit(1)
    say({"ready": True})
    for line in requests:
        request = json.loads(line)
        try:
            result = answer(function, request)
        except BaseException as error:
            result = {"error": describe(error, path)}
        say({"id": request["id"], **result})


main()
