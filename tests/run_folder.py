"""A folder for what the processes of one test run compile, Python and XLA; ``remove`` takes it away at the end of the run.

Importing this makes the folder in the first process, and names it to those that it starts. Bytecode goes there when Python is told not to write
it beside the sources: importing everything takes seconds without.
"""

import os
import shutil
import sys
import tempfile

NAME = "TESTS_RUN_FOLDER"
OWNER = NAME not in os.environ
FOLDER = os.environ.get(NAME) or tempfile.mkdtemp(prefix="tests-run-")
if OWNER:
    os.environ[NAME] = FOLDER
    if sys.dont_write_bytecode:
        sys.dont_write_bytecode = False
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(FOLDER, "python")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

PROGRAMS = os.path.join(FOLDER, "programs")  # a JAX compilation cache
FLAGS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"  # the old ones compile in a third to half of the time
DEFAULT = {"xla_backend_extra_options": ""}  # compiler options: without ``FLAGS``
PLAIN = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": FLAGS}  # environment of processes that are to compile as the tests do
QUICK = PLAIN | {  # and to find what others have compiled
    "JAX_COMPILATION_CACHE_DIR": PROGRAMS,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def remove():
    if OWNER:
        shutil.rmtree(FOLDER, ignore_errors=True)
