"""A process that tries whether a grammar can be compiled, within its own limits of time and memory.

    python grammar_probe.py   stdin: {"path": sys.path, "grammar": ..., "seconds": ...}

llguidance bounds most of what a grammar may cost, but not all: a Lark grammar of 150 characters may
take minutes to compile, and long chains of rules or of "$ref" overflow the stack.  Neither can be
stopped in a process that has to go on.  Here the kernel ends it: exit code 0 says that the grammar
is compiled soon, whatever else is wrong with it.

It runs alone, without gemcut: nothing but llguidance is imported.
"""

import json
import resource
import sys
import threading

MEMORY = 2 << 30  # bytes; a large schema takes 0.1 GB
STACK = 2 << 20  # bytes; less than any thread of a server has


class _Bytes:
    """A vocabulary of the 256 bytes, after the end of text."""

    eos_token_id = 0
    bos_token_id = None
    tokens = (b"</s>", *(bytes([i]) for i in range(256)))
    special_token_ids = (0,)

    def __call__(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]


def _compile(grammar: str) -> None:
    # no name of llguidance at the top: where it lies is told on stdin
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257)
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()


def main() -> None:
    """Compile the grammar of stdin, in a thread with a small stack."""
    task = json.load(sys.stdin)
    sys.path[:] = task["path"]
    seconds = task["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    thread = threading.Thread(target=_compile, args=[task["grammar"]])
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
