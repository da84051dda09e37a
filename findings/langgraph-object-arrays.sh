#!/bin/sh
# langgraph-checkpoint 4.3.2: JsonPlusSerializer turns a NumPy array of dtype object into None, without an error.
#
# An array of numbers or of strings comes back as it was, with its dtype and shape. An array of Python objects is written
# without its values, reading it fails inside, and the caller gets None, alone or within a dict. The same values as a list
# come back. A value of a type that cannot be written, such as `object()`, is refused with a TypeError.
#
# Seen: int64 and <U1 come back, an object array comes back as None, a list as it was, and object() is refused.
#
# Exits 0 while that is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langgraph-checkpoint==4.3.2 numpy==2.4.6
cat > "$folder/arrays.py" <<'PROGRAM'
import sys
from importlib.metadata import version

import numpy
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

serializer = JsonPlusSerializer()


def again(value):
    return serializer.loads_typed(serializer.dumps_typed(value))


def refused(value):
    try:
        serializer.dumps_typed(value)
    except TypeError:
        return True
    return False


arrays = [numpy.array([1, 2]), numpy.array(["a", "b"]), numpy.array(["a", "b"], dtype=object)]
seen = [again({"x": array})["x"] for array in arrays]
as_list = again({"x": arrays[-1].tolist()})["x"]
print(f"langgraph-checkpoint {version('langgraph-checkpoint')}, numpy {numpy.__version__}:")
for array, back in zip(arrays, seen):
    print(f"  {array!r} -> {back!r}")
print(f"  {arrays[-1].tolist()!r} -> {as_list!r}")
print(f"  object() refused: {refused(object())}")
kept = all(numpy.array_equal(array, back) and array.dtype == back.dtype for array, back in zip(arrays[:2], seen))
lost = seen[2] is None and again(arrays[2]) is None
sys.exit(0 if kept and lost and as_list == ["a", "b"] and refused(object()) else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/arrays.py"
