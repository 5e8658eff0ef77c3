"""docs/kvm-map.md: each field has its row, each row an attribute that is there and a test that exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from aiovm.loop import Host, run
from aiovm.vm import Vm

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| `([\w.]+)` \| ([^|]+) \| `([\w.]+)` \| `([\w/.]+)` \| `([\w/.]+)::(\w+)` \|$", re.MULTILINE)
TEXT = (ROOT / "docs" / "kvm-map.md").read_text()
ROWS = ROW.findall(TEXT)


def _words(text):
    return text.split()


#: Linux 4.6, include/linux/kvm_host.h and arch/x86/include/asm/kvm_host.h.
KVM_VCPU = _words("""
kvm preempt_notifier cpu vcpu_id srcu_idx mode requests guest_debug mutex run fpu_active guest_fpu_loaded
guest_xcr0_loaded wq pid sigset_active sigset stat mmio_needed mmio_read_completed mmio_is_write mmio_cur_fragment
mmio_nr_fragments mmio_fragments spin_loop.in_spin_loop spin_loop.dy_eligible preempted arch""")
KVM_VCPU_ARCH = _words("""
regs regs_avail regs_dirty cr0 cr0_guest_owned_bits cr2 cr3 cr4 cr4_guest_owned_bits cr8 hflags efer
apic_base apic apic_attention apic_arb_prio mp_state ia32_misc_enable_msr tpr_access_reporting ia32_xss mmu nested_mmu
walk_mmu time hv_clock hw_tsc_khz pv_time pv_time_enabled pvclock_set_guest_stopped_request""")


@cache
def names_in(path):
    """Functions, methods, and the attributes that are stored or declared."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_every_field_has_a_row_and_every_line_is_one():
    assert [row[0] for row in ROWS] == KVM_VCPU + KVM_VCPU_ARCH
    assert len(ROWS) == TEXT.count("\n| `")


def test_every_attribute_has_a_value():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            for _, _, expression, _, _, _ in ROWS:
                value = vm.vcpus[0]
                first, *rest = expression.split(".")
                assert first == "vcpu"
                for name in rest:
                    value = getattr(value, name)

    run(main())


@pytest.mark.parametrize(("field", "expression", "path"), [(row[0], row[2], row[3]) for row in ROWS])
def test_the_attribute_stands_in_its_file(field, expression, path):
    assert expression.rpartition(".")[2] in names_in(path), field


@pytest.mark.parametrize(("field", "path", "name"), [(row[0], row[4], row[5]) for row in ROWS])
def test_the_test_exists(field, path, name):
    assert name in names_in(path), field
