"""The whole job: pairs in; adapter, products and report out, all published or nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from austeer.adapters._errors import NoEffectError
from austeer.adapters._files import publish_directory
from austeer.adapters._progress import Progress, silent
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import architecture_of
from austeer.adapters.fingerprint import checkpoint_reader, fingerprint
from austeer.adapters.fitting.fit import fit_strength
from austeer.adapters.localization.distributed import launched
from austeer.adapters.localization.run import Ranking, localize
from austeer.adapters.localization.state_file import discard_state
from austeer.adapters.measurement.measure import make_splits
from austeer.adapters.pairs import ContrastivePair, read_pairs, render_pairs
from austeer.adapters.weights import Checkpoint
from austeer.exporter.describe import beta_ranges
from austeer.exporter.preflight import check_files, check_model
from austeer.exporter.products import load_base, make_product, verification_prompts
from austeer.exporter.provenance import Seal, pairs_facts
from austeer.exporter.report import build_report, write_report
from austeer.exporter.samples import before_and_after
from austeer.exporter.settings import Handling, RunOptions
from austeer.exporter.stages import load_ranking, read_texts, resumable, state_folder

ADAPTER = "adapter"
RANKING = "ranking.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class RunReport:
    """Result of a run.

    Attributes:
        out: the published directory.
        values: content of its `report.json`, and how long each stage took.
        adapter: the adapter in it.
    """

    out: Path
    values: dict[str, Any]
    adapter: SteeringAdapter


class _Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.monotonic() - started, 2)


def run_job(options: RunOptions, progress: Progress = silent) -> RunReport:
    """Localize, fit, write every product, prove each, and publish them with a report.

    Processes that torchrun or accelerate started share the localization; then the first goes
    on alone. Until the end the localization's state is in `<out>.state/`: after a stop the
    same call goes on from there. The fit keeps no state and starts anew.

    Raises:
        SystemExit: in all other processes, with code 0.
        NoEffectError: nothing within the budget helps; `out` then holds the report and
            neither an adapter nor a product, and the error's `report` is its content.
        AusteerError: an input is unusable or a product differs from the attached model;
            nothing is published.
    """
    return _Job(options, progress).run(whole=True)


def fit_job(options: RunOptions, progress: Progress = silent) -> RunReport:
    """Localize and fit; publish the adapter's files with the report beside them.

    Raises:
        SystemExit: as for `run_job`.
        NoEffectError: as for `run_job`.
        AusteerError: an input is unusable; nothing is published.
    """
    return _Job(options, progress).run(whole=False)


class _Job:
    def __init__(self, options: RunOptions, progress: Progress) -> None:
        options.check()
        self._options, self._progress, self._clock = options, progress, _Clock()
        self._state = state_folder(options.out)
        # Cheap and often wrong, so before the model.
        self._pairs = read_pairs(options.pairs)
        self._test = read_pairs(options.test_pairs) if options.test_pairs else None
        self._texts = read_texts(options.neutral_text)
        check_files(options)
        with self._stage("load"):
            self._base = load_base(options.base)
        row = architecture_of(self._base.model.config.model_type)
        there = {*options.components, *row.components}
        taken = tuple(component for component in options.candidates if component in there)
        self._options = options = dataclasses.replace(options, components=taken)
        self._ranking = load_ranking(options.ranking, options.candidates)
        check_model(self._base, options)
        self._pairs = render_pairs(self._pairs, self._base.tokenizer)
        self._test = render_pairs(self._test, self._base.tokenizer) if self._test else None

    def run(self, whole: bool) -> RunReport:
        options = self._options
        with resumable(self._state):
            with launched(timedelta(minutes=options.process_timeout)) as group:
                if options.restart and group.is_first:
                    self._discard_state()
                ranking = self._localized()
            if not group.is_first:
                # The others only shared the localization.
                raise SystemExit(0)
            report = self._published(ranking, whole)
        self._discard_state()
        return report

    def _discard_state(self) -> None:
        # With a given ranking none was made: what lies there is of another run.
        if self._options.ranking is None:
            discard_state(self._state)

    def _published(self, ranking: Ranking, whole: bool) -> RunReport:
        out = self._options.out
        try:
            with self._clock.time("fit"):
                adapter, fit = self._fit(ranking)
        except NoEffectError as error:
            error.report = self._report(error.report)
            with publish_directory(out) as work:
                write_report(error.report, work)
                self._close(work, None)
            self._discard_state()
            raise
        with publish_directory(out) as work:
            values = (self._write_run if whole else self._write_adapter)(adapter, fit, work)
            write_report(values, work)
            self._close(work, adapter)
        return RunReport(out, values, adapter)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Time a stage that reports no progress of its own, and announce it."""
        self._progress(name, 0, 1)
        with self._clock.time(name):
            yield
        self._progress(name, 1, 1)

    def _localized(self) -> Ranking:
        """The given ranking, or one of the fit split: test pairs must choose nothing."""
        if self._ranking is None:
            options = self._options
            with self._clock.time("localize"):
                self._ranking = localize(
                    self._base.model,
                    self._base.tokenizer,
                    make_splits(self._pairs, self._test, options.seed).fit,
                    components=options.candidates,
                    batch_size=options.batch_size,
                    state=self._state,
                    progress=partial(self._progress, "localize"),
                )
        return self._ranking

    def _fit(self, ranking: Ranking) -> tuple[SteeringAdapter, dict[str, Any]]:
        options = self._options
        adapter, report = fit_strength(
            self._base.model,
            self._base.tokenizer,
            self._pairs,
            ranking,
            strength=options.resolved_strength,
            kl_budget=options.kl_budget,
            max_units=options.max_units,
            fluency_limit=options.fluency_limit,
            components=options.candidates,
            test_pairs=self._test,
            rank=options.rank,
            keep_sign=options.keep_sign,
            neutral_text=self._texts,
            seed=options.seed,
            batch_size=options.batch_size or 16,
            progress=self._progress,
        )
        config = dataclasses.replace(
            adapter.config,
            revision=options.base.revision,
            base_model_fingerprint=self._fingerprint(adapter),
            fit=adapter.config.fit | {"beta": beta_ranges(adapter, ranking)},
        )
        return SteeringAdapter(config, adapter.sites), report

    def _fingerprint(self, adapter: SteeringAdapter) -> str:
        """Of the base's files: the live model may be loaded in another dtype."""
        read = checkpoint_reader(adapter.architecture, Checkpoint(self._base.folder))
        return fingerprint(adapter.architecture, [s.site for s in adapter.sites], read)

    def _write_adapter(
        self, adapter: SteeringAdapter, fit: dict[str, Any], work: Path
    ) -> dict[str, Any]:
        adapter.write_files(work)
        return self._report(fit, adapter, samples=self._samples(adapter))

    def _write_run(
        self, adapter: SteeringAdapter, fit: dict[str, Any], work: Path
    ) -> dict[str, Any]:
        folder = work / ADAPTER
        folder.mkdir()
        adapter.write_files(folder)
        self._localized().save(work / RANKING)
        handling = Handling(trust_remote_code=self._options.base.trust_remote_code)
        prompts = verification_prompts(self._test or self._pairs)
        products = []
        for route in self._options.routes:
            product = work / route.value
            product.mkdir()
            with self._clock.time(route.value):
                row = make_product(
                    route,
                    self._base,
                    adapter,
                    product,
                    prompts,
                    handling,
                    self._progress,
                    seal=self._seal,
                )
            products.append(row)
        return self._report(fit, adapter, products, self._samples(adapter))

    @property
    def _seal(self) -> Seal:
        options = self._options
        return Seal(
            command=options.command,
            model=options.base.model,
            revision=options.base.revision,
            seed=options.seed,
            sums=options.sums,
        )

    def _close(self, work: Path, adapter: SteeringAdapter | None) -> None:
        facts = {"options": self._options.as_dict(), "data": self._data()}
        self._seal.close_job(work, self._base.folder, adapter, facts)

    def _samples(self, adapter: SteeringAdapter) -> list[dict[str, str]]:
        with self._stage("samples"):
            return before_and_after(self._base, adapter, self._test or self._pairs)

    def _report(
        self,
        fit: dict[str, Any],
        adapter: SteeringAdapter | None = None,
        products: Sequence[dict[str, Any]] = (),
        samples: Sequence[dict[str, str]] = (),
    ) -> dict[str, Any]:
        options = self._options
        return build_report(
            fit,
            options=options.as_dict(),
            data=self._data(),
            seconds=self._clock.seconds,
            adapter=adapter,
            products=products,
            samples=samples,
            command=options.command,
        )

    def _data(self) -> dict[str, Any]:
        data = {"pairs": _described(self._options.pairs, self._pairs)}
        if self._test is not None:
            data["test_pairs"] = _described(self._options.test_pairs, self._test)
        return data


def _described(path: str | None, pairs: list[ContrastivePair]) -> dict[str, Any]:
    return {"path": path} | pairs_facts(pairs)
