"""``edge-vlm chat``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_vlm.cli.choose import LostDetail
from edge_vlm.cli.options import (
    answer_options,
    cached_image_options,
    machine_settings,
    model_option,
    output_options,
)
from edge_vlm.cli.questions.words import as_path, names_pictures, typed_paths
from edge_vlm.cli.session import in_words, session
from edge_vlm.cli.streams import say, write_answer, write_json
from edge_vlm.errors import BudgetError, Cancelled, EdgeVLMError, InputError, label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge_vlm.answering.answer import Answer
    from edge_vlm.answering.model import Chat, EdgeVLM, Stream
    from edge_vlm.cli.questions.line_input import LineInput
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.progress import CancelToken, OnProgress

HELP = """\
/image PATH   add a picture to the next question
/images       list the pictures
/undo         take the last question and its answer back
/retry        answer the last question again
/save FILE    write the conversation as JSON (OpenAI's messages)
/load FILE    go on with a conversation from such a file
/stats        what the last answer took, and how full the context is
/reset        forget everything
/quit         leave (so do Ctrl-D, and Ctrl-C twice)
Ctrl-C stops an answer; what was said of it stays. A question that begins with / takes another /
in front."""
COMMANDS = ("/help", *(line.split()[0] for line in HELP.splitlines() if line.startswith("/")))


@click.command("chat")
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@model_option
@click.option("--load", metavar="FILE.json", help="Go on with a conversation from a file.")
@answer_options
@click.option(
    "--drop-oldest",
    is_flag=True,
    help="When the context is full, forget the oldest questions without asking; pictures stay.",
)
@click.option("--no-history", is_flag=True, help="Neither read nor write the history of lines.")
@cached_image_options
@output_options
def command(
    images: tuple[str, ...],
    model: str | None,
    load: str | None,
    drop_oldest: bool,
    no_history: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Talk about pictures: the first question is about the IMAGEs given, /image adds more.

    A follow-up costs only its own tokens. If stdin is not a terminal, each of its lines is a
    question, and only the answers are written to stdout; --json writes an object for each.

    \b
    edge-vlm chat receipt.jpg
    printf 'What is the total?\\nAnd the date?\\n' | edge-vlm chat receipt.jpg
    """
    from edge_vlm.answering.answer import AskOptions
    from edge_vlm.cli.choose import pick_model, read_picture
    from edge_vlm.cli.questions.line_input import LineInput
    from edge_vlm.machine.folders import platform_folder

    settings, wanted = machine_settings(options)
    AskOptions(**wanted)  # says what is wrong before a model is loaded
    paths = [as_path(image) for image in images]
    for image in paths:
        read_picture(image, settings.max_pixels, settings.image_formats)
    vlm = _load(pick_model(model), settings)
    history = None
    with contextlib.suppress(InputError):  # no home, no history
        history = None if no_history else platform_folder("state") / "chat_history"
    with vlm, vlm.chat(**wanted) as chat, LineInput(COMMANDS, history) as lines:
        talk = _Session(chat, lines, settings, list(paths), as_json, drop_oldest)
        if load:
            talk.load(load)
        code = talk.run()
    if code:
        raise SystemExit(code)


@dataclass
class _Session:
    """One run of the command; methods with the name of one of ``COMMANDS`` do what it says."""

    chat: Chat
    lines: LineInput
    settings: MachineSettings
    waiting: list[Any]  # pictures for the next question
    as_json: bool
    drop_oldest: bool
    failed: str | None = None  # the last question, if it was not answered
    last: Answer | None = None
    without: str | None = None  # what failed that the next question needs
    lost_detail: LostDetail = field(default_factory=LostDetail)

    def run(self) -> int:
        """Read and answer until the end; the exit code of the last error if nobody saw it."""
        if self.lines.is_terminal:
            say("Ask about the pictures; /help lists the commands, Ctrl-D leaves.")
        code = 0
        interrupted = False
        while True:
            try:
                line = self.lines.read()
            except KeyboardInterrupt:
                if interrupted or not self.lines.is_terminal:
                    raise
                interrupted = True
                say("\nCtrl-C again, Ctrl-D or /quit leaves.")
                continue
            interrupted = False
            if line is None or line.split()[:1] == ["/quit"]:
                return 0 if self.lines.is_terminal else code
            try:
                self._obey(line.strip())
            except Cancelled:
                say("stopped before the answer began; /retry asks again")
            except BrokenPipeError:
                raise
            except Exception as error:  # whatever one line did, the next may be better
                code = self._report_error(error)

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if not line:
            return
        if name in COMMANDS:
            getattr(self, name.removeprefix("/"))(rest.strip())
        elif not line.startswith("//") and names_pictures(line):
            self.image(line)
        elif line.startswith("/") and not line.startswith("//"):
            raise InputError(f"{name[:40]}: no such command; /help lists them")
        else:
            self._ask(line.removeprefix("/") if line.startswith("//") else line)

    def help(self, _: str) -> None:
        say(HELP)

    def _ask(self, question: str) -> None:
        without, self.without = self.without, None
        if without:
            raise InputError(f"not asked, as a line before it failed: {without}")
        self.failed = question
        try:
            self._turn(lambda **how: self.chat.stream(self.waiting, question, **how))
        except BudgetError as error:
            self._make_room(question, error)
            self._turn(lambda **how: self.chat.stream(self.waiting, question, **how))
        self.failed = None
        self.waiting = []

    def _make_room(self, question: str, full: BudgetError) -> None:
        """Drop the oldest questions if that is wanted and helps.

        Raises:
            BudgetError: not so.
        """
        n = self.chat.n_to_drop(self.waiting, question)
        if not n:
            raise full
        what = "the oldest question and its answer" if n == 1 else f"the {n} oldest questions"
        say(f"The context is full: {full}.")
        if not self.drop_oldest and not self.lines.confirm(f"Forget {what}? The pictures stay."):
            raise BudgetError(f"the context is full; --drop-oldest forgets {what}") from full
        self.waiting = [*self.chat.drop_oldest(n), *self.waiting]
        say(f"forgot {what}")

    def retry(self, _: str) -> None:
        if self.failed is not None:
            self._ask(self.failed)
        else:
            self._turn(self.chat.retry)

    def _turn(self, begin: Callable[..., Stream]) -> None:
        from edge_vlm.cli.interrupt import run_interruptibly, stopping
        from edge_vlm.progress import CancelToken

        cancel = CancelToken()

        def work(_: CancelToken, progress: OnProgress) -> Iterator[str | Answer]:
            with begin(progress=progress, cancel=cancel, keep_partial=True) as stream:
                yield from stream
                yield stream.answer

        wrote = False
        with stopping(cancel):
            try:
                for event in run_interruptibly(work, cancel):
                    if not isinstance(event, str):
                        self.last = event
                        self.lost_detail.note(event.images)
                    elif not self.as_json:
                        write_answer(event)
                        wrote = True
            finally:
                if wrote:
                    write_answer("\n")
        if self.last:
            self._report(self.last, wrote)

    def _report(self, answer: Answer, wrote: bool) -> None:
        if self.as_json:
            write_json(answer.to_dict())
        elif not wrote:
            write_answer("\n")  # an empty answer is a line too
        if answer.finish_reason == "cancelled":
            say("stopped; /retry answers again, /undo takes the question back")
        elif answer.finish_reason == "length":
            say("the answer was cut: --max-tokens, or the context is full")
        elif answer.finish_reason == "repetition":
            say("stopped: it said the same over and over; --no-loop-guard lets it")
        if session().verbose:
            self.stats()

    def _report_error(self, error: Exception) -> int:
        if self.as_json:
            write_json({"error": " ".join(in_words(error)[0].split())})
        return session().report(error)

    @contextlib.contextmanager
    def _needed(self) -> Iterator[None]:
        """In a pipe nobody sees an error here, so the next question is not asked without this."""
        try:
            yield
        except EdgeVLMError as error:
            self.without = None if self.lines.is_terminal else str(error)
            raise

    def image(self, name: str) -> None:
        from edge_vlm.cli.choose import read_picture

        with self._needed():
            if not name:
                raise InputError("/image: which? /image PATH")
            for path in typed_paths(name):
                height, width, _ = read_picture(
                    path, self.settings.max_pixels, self.settings.image_formats
                ).shape
                self.waiting.append(path)
                say(f"{label(path)} ({width}x{height}) goes with the next question")

    def images(self, _: str) -> None:
        from edge_vlm.prompt.messages import images_of

        told = [f"{_name(source)}" for source in images_of(self.chat.messages)]
        told += [f"{_name(source)} (with the next question)" for source in self.waiting]
        say("\n".join(f"{i}. {line}" for i, line in enumerate(told, 1)) or "no pictures")

    def undo(self, _: str) -> None:
        from edge_vlm.prompt.messages import images_of

        taken = self.chat.undo()
        if not taken:
            raise InputError("/undo: there is no question to take back")
        pictures = images_of(taken)
        self.waiting = [*pictures, *self.waiting]
        self.failed = None
        question = next(message.text for message in taken if message.role == "user")
        kept = "; its pictures go with the next question" if pictures else ""
        say(f"took back: {question[:100]}{kept}")

    def save(self, name: str) -> None:
        from edge_vlm.prompt.transcript import write_transcript

        if not name:
            raise InputError("/save: where? /save FILE")
        if not self.chat.messages:
            raise InputError("/save: nothing was said yet")
        path = typed_paths(name)[0]
        write_transcript(Path(path), self.chat.messages)
        say(f"saved {len(self.chat.messages)} messages to {label(path)}")

    def load(self, name: str) -> None:
        """Go on with the conversation in a file."""
        from edge_vlm.prompt.transcript import MAX_BYTES, read_json

        with self._needed():
            if not name or name == "-":
                raise InputError("/load: which file? /load FILE")
            path = typed_paths(name)[0]
            data = read_json(path, MAX_BYTES)
            messages = data.get("messages") if isinstance(data, dict) else data
            while isinstance(messages, list) and messages and _role(messages[-1]) == "user":
                messages = messages[:-1]
                say(f"{label(path)}: its last question has no answer and was left out")
            self.chat.restart(messages or ())
        self.failed = self.last = None
        say(f"loaded {len(self.chat.messages)} messages from {label(path)}")

    def reset(self, _: str) -> None:
        self.chat.restart()
        self.waiting, self.failed, self.last, self.without = [], None, None, None
        say("forgot everything")

    def stats(self, _: str = "") -> None:
        answer = self.last
        if answer is None:
            say("nothing was answered yet")
            return
        used = answer.prompt_tokens + len(answer.token_ids)
        times = answer.timings
        n_new = answer.prompt_tokens - answer.cached_tokens
        say(
            f"context: {used} tokens, {answer.image_tokens} of {len(answer.images)} pictures;"
            f" KV cache {answer.kv_bytes / 1e6:.1f} of {self.settings.kv_budget / 1e6:g} MB\n"
            f"last answer: {n_new} tokens prefilled, {answer.cached_tokens} were cached;"
            f" {len(answer.token_ids)} generated ({answer.finish_reason})\n"
            f"vision {times.vision:.2f} s, prefill {times.prefill:.2f} s,"
            f" decode {times.decode:.2f} s ({times.decode_tokens_per_second:.1f} tokens/s);"
            f" peak memory {answer.peak_rss_bytes / 1e6:.0f} MB"
        )


def _load(model: str | None, settings: MachineSettings) -> EdgeVLM:
    from edge_vlm.cli.interrupt import run_interruptibly

    def work(_: CancelToken, progress: OnProgress) -> Iterator[EdgeVLM]:
        from edge_vlm.answering.model import EdgeVLM

        yield EdgeVLM.load(model, settings=settings, progress=progress)

    [vlm] = run_interruptibly(work)
    loaded: EdgeVLM = vlm
    return loaded


def _name(source: Any) -> str:
    if isinstance(source, str) and not source.startswith("data:"):
        return label(source)
    return "a picture given as data"


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
