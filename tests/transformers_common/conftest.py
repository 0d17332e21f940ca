# SPDX-License-Identifier: Apache-2.0
"""The marks that transformers' tests use, and the rule that no test is skipped without a reason of ours."""

import pytest

MARKS = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test is_training_test torch_compile_test"


def pytest_configure(config):
    for mark in MARKS.split():
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    skips = getattr(item.module, "SKIPS", None)
    if report.skipped and skips is not None and not any(name in item.nodeid for name in skips):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} is skipped without an explanation in SKIPS: {report.longrepr}"
    return report
