"""Tool calls and reasoning in a model's output: the formats of model families, their parsers and their grammars."""

from intaglio.server.markup.forms import FORMS, HERMES, PLAIN, Form, Thinking, form_of, takes_tools, thinking_of
from intaglio.server.markup.grammars import after_analysis, after_reasoning, call_grammar
from intaglio.server.markup.reader import OutputStyle, Reader, begins_inside, parameters
from intaglio.server.markup.source import CallArguments, CallStart, Part, TextDelta, Tools

__all__ = [
    "FORMS", "HERMES", "PLAIN", "CallArguments", "CallStart", "Form", "OutputStyle", "Part", "Reader", "TextDelta",
    "Thinking", "Tools", "after_analysis", "after_reasoning", "begins_inside", "call_grammar", "form_of", "parameters",
    "takes_tools", "thinking_of",
]  # fmt: skip
