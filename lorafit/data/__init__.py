"""Data files to token ids and the mask of the learned ones, with a report on every row that can't be used."""

from lorafit.data.chat import DEFAULT_TEMPLATE, Chat
from lorafit.data.dataset import Dataset, fingerprint, prepare
from lorafit.data.example import Example, Fault, Message, RowFault
from lorafit.data.formats import parse
from lorafit.data.read import read
from lorafit.data.report import Report
from lorafit.data.tokens import Tokens, encode, encode_all

__all__ = [
    "DEFAULT_TEMPLATE",
    "Chat",
    "Dataset",
    "Example",
    "Fault",
    "Message",
    "Report",
    "RowFault",
    "Tokens",
    "encode",
    "encode_all",
    "fingerprint",
    "parse",
    "prepare",
    "read",
]
