"""Ask the base and the adapter the same questions. Both answer from one model in memory.

    python examples/03_chat_and_compare.py runs/library

The session also restores the chat template, stop tokens and system prompt the adapter was trained with.
"""

import argparse

from lorafit.data import Message
from lorafit.generate import answer
from lorafit.session import open_session

parser = argparse.ArgumentParser()
parser.add_argument("run", nargs="?", default="runs/library")
parser.add_argument("--max-new", default=40, type=int)
args = parser.parse_args()

session = open_session([args.run])
(name,) = session.host.adapters
chat = session.chat(name)
for question in ("When do you open?", "May I borrow a magazine?"):  # the second one isn't in the data
    ids = chat.prompt_ids([Message("user", question)])
    print(question)
    for who in (None, name):  # None is the plain base
        print(f"  {who or 'base':<8} {answer(session.host, chat, ids, who, max_new=args.max_new)!r}")
