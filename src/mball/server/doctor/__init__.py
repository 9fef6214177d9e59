"""`mball doctor`: what this machine has for MBALL, and what each missing thing costs."""

from mball.server.doctor.cli import doctor
from mball.server.doctor.examine import examine
from mball.server.doctor.report import Finding, Report

__all__ = ["Finding", "Report", "doctor", "examine"]
