"""Weights of active adapters that are not the same on all modules."""

from adapterkit.core.adapter.weights_file import Weight, WeightsFile


class ModuleWeight(float):
    """An adapter's weight by a file of weights: as a number that of the modules which it does not
    name."""

    def __new__(cls, file: WeightsFile, number: int) -> "ModuleWeight":
        self = super().__new__(cls, file.default[number])
        self.file, self.number = file, number
        return self

    file: WeightsFile
    number: int  # the adapter's in the file

    def __reduce__(self) -> tuple:
        return ModuleWeight, (self.file, self.number)

    def on(self, module: str) -> Weight:
        """The weight on a module or parameter: one, or those of its delta's directions."""
        return self.file.weights_of(self.number, module)


def weight_on(weight: float, module: str) -> Weight:
    """A weight on a module or parameter."""
    return weight.on(module) if isinstance(weight, ModuleWeight) else weight
