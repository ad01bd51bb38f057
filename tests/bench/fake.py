"""What stands in for a machine: a clock that goes as it is told, and a CPU that passes for a GPU."""


class Clock:
    """A GPU on which each call takes as long as it says."""

    def __init__(self):
        self.now, self.cleared = 0.0, 0

    def call(self, *seconds):
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def clear_cache(self):
        self.cleared += 1
        self.now += 100.0

    def mark(self):
        return self.now

    def seconds(self, begin, end):
        return end - begin

    def captured(self, call, times):
        return lambda: [call() for _ in range(times)]


class PretendedGpu(str):
    """The device "cpu" to torch, and equal to "cuda" for whoever asks: the cases of a GPU with tensors of the CPU."""

    __slots__ = ()

    def __new__(cls):
        return super().__new__(cls, "cpu")

    def __eq__(self, other):
        return other == "cuda"

    def __ne__(self, other):
        return other != "cuda"

    def __hash__(self):
        return hash("cuda")
