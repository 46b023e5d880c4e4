"""The time of calls, where several devices compute: by a stand-in for CUDA."""

from contextlib import contextmanager

import pytest
import torch

from fastdit.pipelines.stats import Stopwatch

HERE, ELSEWHERE = torch.device("cuda", 0), torch.device("cuda", 1)


class Cuda:
    """Pretend to have two devices; device 1 may be recording a graph."""

    def __init__(self, monkeypatch, capturing=()):
        self.current, self.capturing, self.recorded = HERE, capturing, []
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: self)
        for name in ("device", "current_stream", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def current_stream(self, device=None):
        return self.current if device is None else device

    def is_current_stream_capturing(self):
        return self.current in self.capturing

    def record(self, stream=None):
        self.recorded.append(self.current if stream is None else stream)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 250.0


@pytest.mark.parametrize("device", [HERE, ELSEWHERE], ids=str)
def test_events_are_on_the_device_that_computes(monkeypatch, device):
    cuda, watch = Cuda(monkeypatch), Stopwatch()
    assert watch.time(device, lambda: cuda.current) == HERE, "the call runs as it would without a clock"
    assert cuda.recorded == [device, device] and watch.seconds == 0.25


@pytest.mark.parametrize("device", [HERE, ELSEWHERE], ids=str)
def test_nothing_is_recorded_while_the_device_captures(monkeypatch, device):
    cuda, watch = Cuda(monkeypatch, capturing=[ELSEWHERE]), Stopwatch()
    watch.time(device, lambda: None)
    assert len(cuda.recorded) == (0 if device == ELSEWHERE else 2)
