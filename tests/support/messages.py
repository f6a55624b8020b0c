"""What dgc logs, and what it raises, in a process of its own."""

import logging


class Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []
        logging.getLogger("dgc").addHandler(self)
        logging.getLogger("dgc").setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append(record.getMessage())


def error_of(call):
    """Returns the error of a call, with its type in front; an empty text where it has none."""
    try:
        call()
    except (FloatingPointError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
