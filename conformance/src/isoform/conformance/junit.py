"""A run as JUnit XML, the form in which continuous integration reads test results.

A suite for every implementation, a test case for every check. What an implementation does not
support, what was not run, and what is known to fail count as skipped, with the reason.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from isoform.conformance.run import Run
from isoform.conformance.summary import command, reason
from isoform.conformance.verdicts import Outcome, Verdict

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(run: Run) -> str:
    """``run`` as a JUnit XML document."""
    root = ET.Element("testsuites", name="isoform")
    for name in run.implementations:
        suite = ET.SubElement(root, "testsuite", name=name)
        suite.set("timestamp", run.environment.get("date", ""))
        properties = ET.SubElement(suite, "properties")
        for key, value in run.environment.items():
            ET.SubElement(properties, "property", name=key, value=value)
        for outcome in run.outcomes:
            if outcome.implementation == name:
                suite.append(_test_case(run, outcome))
        _count(suite, suite.findall("testcase"))
    _count(root, root.findall("testsuite/testcase"))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _test_case(run: Run, outcome: Outcome) -> ET.Element:
    case = ET.Element(
        "testcase",
        classname=f"{outcome.implementation}/{outcome.case}",
        name=f"{outcome.group}/{outcome.check}",
        time=f"{outcome.seconds:.6f}",
    )
    message = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", outcome.message)
    if outcome.verdict.fails and (why := reason(run, outcome)) is not None:
        ET.SubElement(case, "skipped", message=f"expected failure: {why}")
    elif outcome.verdict.fails:
        kind = "error" if outcome.verdict is Verdict.ERROR else "failure"
        found = ET.SubElement(case, kind, type=outcome.verdict, message=message)
        checks = ", ".join(outcome.failed_checks)
        found.text = f"{checks}: {message}\n{command(run, outcome)}"
    elif outcome.verdict in (Verdict.UNSUPPORTED, Verdict.NOT_RUN):
        ET.SubElement(case, "skipped", message=f"{outcome.verdict}: {message}")
    return case


def _count(element: ET.Element, cases: list[ET.Element]) -> None:
    """Say on ``element`` how many of ``cases`` there are of each kind."""
    element.set("tests", str(len(cases)))
    for attribute, child in {
        "failures": "failure",
        "errors": "error",
        "skipped": "skipped",
    }.items():
        element.set(attribute, str(sum(case.find(child) is not None for case in cases)))
    element.set("time", f"{sum(float(case.get('time', 0)) for case in cases):.6f}")
