"""``adajudge`` commands in processes of their own that need no time to start: forked from one that has imported everything.

As a script it is that process: it reads requests, one JSON object a line, and answers each with a number.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class ForkingAdajudge:
    """Starts commands and waits for them."""

    def __enter__(self):
        command = [sys.executable, "-m", "tests.adajudge.forking_adajudge"]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        return self

    def __exit__(self, *error):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, log, *arguments, folder=ROOT, **environment):
        """Start a command in `folder`, whose output goes to the file `log`; returns its process id."""
        request = {"arguments": [str(a) for a in arguments], "folder": str(folder)}
        return self._ask(request | {"log": str(log), "environment": environment})

    def wait(self, process):
        """The exit code of a command, or minus the signal that killed it."""
        return self._ask({"wait": process})

    def has_ended(self, process):
        return bool(self._ask({"look": process}))

    def kill(self, process):
        """`kill -9`; whether there was something to kill."""
        os.kill(process, signal.SIGKILL)  # it is there as long as nobody has waited for it
        return self.wait(process) == -signal.SIGKILL

    def run(self, log, *arguments, **how):
        return self.wait(self.start(log, *arguments, **how))

    def _ask(self, request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def _serve():
    import rich.progress  # noqa: F401
    import torch
    import torch.distributed
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from adajudge.cli import main

    torch.set_num_threads(1)  # a thread pool would not survive the fork
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif "look" in request:
            ended = os.waitid(os.P_PID, request["look"], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            answer = int(ended is not None)
        else:
            answer = os.fork()
            if answer == 0:
                _become(request, main)
        print(answer, flush=True)


def _become(request, main):
    code = 70  # of an exception
    try:
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = main(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
