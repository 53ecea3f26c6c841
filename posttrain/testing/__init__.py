"""The laws that every algorithm, reward, model and data source keeps, as classes of tests for your own.

In a file that pytest collects::

    from posttrain.testing import AlgorithmLaws

    class TestMine(AlgorithmLaws):
        algorithm = Mine()

posttrain's own tests run the same classes. This package does not import pytest. Each law is a method whose
name begins with ``test_``, so pytest finds the laws without a plug-in, ``-k`` chooses among them, and a
subclass that leaves one out does so in a line that a reader sees (``test_x = None``).
"""

from posttrain.testing.algorithms import AlgorithmLaws
from posttrain.testing.data import DataLaws
from posttrain.testing.law import BlockLaws, LawBroken, laws
from posttrain.testing.models import ModelLaws
from posttrain.testing.rewards import RewardLaws

__all__ = ["AlgorithmLaws", "BlockLaws", "DataLaws", "LawBroken", "ModelLaws", "RewardLaws", "laws"]
