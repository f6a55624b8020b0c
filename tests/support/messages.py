"""What dgc logs in a process of its own."""

import logging


class Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []
        logging.getLogger("dgc").addHandler(self)
        logging.getLogger("dgc").setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append(record.getMessage())
