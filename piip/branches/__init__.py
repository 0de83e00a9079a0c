"""Branches: the contract, and one file per kind of network."""

from piip.branches.base import Branch, create_branch, list_branches, register_branch
from piip.branches.convnext import ConvNeXtBranch
from piip.branches.vit import ViTBranch

__all__ = ["Branch", "ConvNeXtBranch", "ViTBranch", "create_branch", "list_branches", "register_branch"]
