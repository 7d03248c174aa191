"""`kata watch`: the verdict at every save."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from kata.course.catalog import Exercise
from kata.judge.report import Report, SpecReport, Starts
from kata.judge.server import Request, WarmServer
from kata.learn import verdict, views
from kata.learn.keys import keyboard, saves
from kata.learn.lines import near, width
from kata.learn.recorder import write_down

KEYS = {
    "n": "next", "h": "hint", "d": "diff", "p": "picture", "l": "list", "r": "rerun", "q": "quit",
}  # fmt: skip
SLOW = 0.25  # seconds: from here on we say that we are at it, and look at the files ourselves


class Watch:
    """One terminal, one warm server, one exercise at a time."""

    def __init__(self, exercise: Exercise, console: Console, parts: str) -> None:
        self.exercise, self.console, self.parts = exercise, console, parts
        self.server = WarmServer(self.job)
        self.seen = self.saved()
        self.running = self.told = False
        self.report: Report | None = None
        self.spec = ""  # that runs

    @property
    def job(self) -> Request:
        """What is judged at a save."""
        return Request(str(self.exercise.root), self.exercise.stem, "", ["--parts", self.parts])

    def files(self) -> list[Path]:
        """What a verdict depends on: the stub, its specs and the parts that it imports."""
        parts = [self.exercise.root / self.parts / f"{stem}.py" for stem in self.exercise.parts]
        return [self.exercise.stub, self.exercise.spec, *parts]

    def saved(self) -> dict[Path, int]:
        """When each file was last written."""
        return {path: path.stat().st_mtime_ns for path in self.files() if path.exists()}

    def loop(self) -> None:
        """Until the learner quits."""
        self.rerun()
        with saves(self.exercise.root) as woken, keyboard() as keys:
            while True:
                sources: list[Any] = [self.server.connection, woken]
                if keys.in_front:
                    sources.append(keys.fd)
                ready = wait(sources, timeout=SLOW)
                if keys.continued:
                    keys.continued = False
                    self.draw()
                if keys.fd in ready and keys.in_front and keys.fd is not None:
                    typed = os.read(keys.fd, 64).decode(errors="ignore").lower()
                    if not typed:
                        keys.fd = None  # nobody is there: go on without keys
                    if any(self.press(key) for key in typed):
                        return
                if woken in ready:
                    os.read(woken, 4096)
                if self.server.connection in ready:
                    self.receive()
                # Not every mount tells of its changes, so the files are looked at in any case.
                if (now := self.saved()) != self.seen:
                    self.seen = now
                    self.rerun()
                elif self.running and not ready and not self.told:
                    self.told = True
                    sentence = SpecReport(self.spec, "").sentence
                    self.console.print(Text(f"judging: {sentence or 'reading the specs'}", "dim"))

    def rerun(self) -> None:
        """Judge now; what is being judged is cancelled."""
        if self.report and self.report.naming:  # it has no name yet, and is a try all the same
            write_down(self.report, self.job)
        self.running, self.told, self.spec, self.report = True, False, "", None
        self.server.run(self.job)

    def receive(self) -> None:
        """Show the verdict that has come."""
        try:
            message = self.server.receive()
        except (EOFError, OSError):
            self.console.print(
                Text("the process that judges has ended; starting another", "yellow")
            )
            self.server.close()
            self.server = WarmServer(self.job)
            self.rerun()
            return
        if isinstance(message, Starts):
            self.spec = message.spec
            return
        self.report = message
        self.running = self.told = self.report.naming
        self.report.warnings = [] if self.report.naming else write_down(self.report, self.job)
        self.draw()

    def draw(self) -> None:
        """The verdict, if there is one, and the keys."""
        if self.report:
            if self.console.is_terminal:
                self.console.clear()
            verdict.show(self.report, self.exercise, self.console, "press n")
            for warning in self.report.warnings:
                self.console.print(Text(warning, "yellow"))
            if self.report.naming:
                self.console.print(Text(f"  {verdict.LOOKING}", "dim"))
        keys = [part for key, word in KEYS.items() for part in ((key, "bold cyan"), f" {word}   ")]
        self.console.print(Text.assemble("\n", *keys))

    def press(self, key: str) -> bool:
        """Do what a key asks for; True to quit."""
        word = KEYS.get(key)
        try:
            if word == "next":
                self.go_on()
            elif word == "hint":
                hint = views.next_hint(self.exercise)
                self.console.print(hint, width=width(self.console))
            elif word == "diff":
                views.must_have_passed(self.exercise)
                self.console.print(views.beside(self.exercise, self.console.width))
            elif word == "picture":
                command = [sys.executable, "-m", "kata", "show", self.exercise.stem]
                subprocess.run(command, cwd=self.exercise.root, stdin=subprocess.DEVNULL)
            elif word == "list":
                self.console.print(views.map_of(self.exercise.root))
            elif word == "rerun":
                self.rerun()
        except (OSError, ValueError) as error:
            self.console.print(Text(str(error), "yellow"))
        return word == "quit"

    def go_on(self) -> None:
        """To the next exercise that has not passed."""
        following = views.next_after(self.exercise.root, self.exercise)
        if following is None:
            raise ValueError("every exercise has passed")
        self.exercise, self.seen = following, {}
        self.seen = self.saved()
        self.server.prepare(self.job)
        self.rerun()


def watch(exercise: Exercise, console: Console, parts: str = "solutions") -> None:
    """Watch one exercise after another until the learner quits."""
    stub = near(str(exercise.stub))
    console.print(Text.assemble(("watching ", "dim"), (stub, "cyan"), ("  warming up …", "dim")))
    watching = Watch(exercise, console, parts)
    try:
        watching.loop()
    except KeyboardInterrupt:
        pass
    finally:
        watching.server.close()
