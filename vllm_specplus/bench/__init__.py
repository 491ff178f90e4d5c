"""Side-by-side benchmark of speculative decoding methods on one model and one dataset.

`dataset` reads the questions, `methods` the command line's method specifications, `runner`
drives one child process (`engine`) per method, `report` turns what they measured into numbers
and `render` shows them. Only `engine` imports vLLM, and only in the child process.
"""


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence that says why."""
