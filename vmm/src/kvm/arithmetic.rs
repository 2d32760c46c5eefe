//! What a CPU computes where the architecture leaves it open: approximations, transcendental
//! functions, flags called undefined. No CPUID bit tells, guests see it, and it may differ between
//! two generations of one vendor; so a few thousand results are hashed, and pairing compares that.

use core::arch::asm;
use core::arch::x86_64::{_mm_cvtss_f32, _mm_rcp_ss, _mm_rsqrt_ss, _mm_set_ss};

/// How many inputs each instruction gets.
const SAMPLES: u32 = 2048;

/// A hash of the results on the calling CPU, and of which bits of MXCSR it has.
pub(super) fn fingerprint() -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&mxcsr_mask().to_le_bytes());
    for sample in 0..SAMPLES {
        // All exponents, and mantissas that are far from regular.
        let bits = (sample << 20 & 0x7f80_0000) | (sample.wrapping_mul(0x9e37_79b1) & 0x007f_ffff);
        for result in approximations(f32::from_bits(bits)) {
            hasher.update(&result.to_bits().to_le_bytes());
        }
        let angle = f64::from(sample) * 0.012_345 - 9.0;
        for result in transcendental(angle) {
            hasher.update(&result.to_bits().to_le_bytes());
        }
        hasher.update(&undefined_flags(bits).to_le_bytes());
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    hash
}

/// RCPSS and RSQRTSS.
fn approximations(of: f32) -> [f32; 2] {
    // SAFETY: every x86-64 CPU has SSE, and no memory is involved.
    unsafe {
        let of = _mm_set_ss(of);
        [_mm_rcp_ss(of), _mm_rsqrt_ss(of)].map(|result| _mm_cvtss_f32(result))
    }
}

/// FSIN, FPTAN, and F2XM1 and FYL2X of something in their range.
fn transcendental(of: f64) -> [f64; 4] {
    let (mut sine, mut tangent, mut power, mut logarithm) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64);
    let (fraction, positive) = (of.fract(), of.abs() + 0.001);
    // SAFETY: each pops what it pushes, and touches the numbers that it is given alone.
    unsafe {
        asm!("fld qword ptr [{i}]", "fsin", "fstp qword ptr [{o}]",
            i = in(reg) &raw const of, o = in(reg) &raw mut sine, out("st(0)") _, out("st(1)") _);
        asm!("fld qword ptr [{i}]", "fptan", "fstp st(0)", "fstp qword ptr [{o}]",
            i = in(reg) &raw const of, o = in(reg) &raw mut tangent, out("st(0)") _, out("st(1)") _);
        asm!("fld qword ptr [{i}]", "f2xm1", "fstp qword ptr [{o}]",
            i = in(reg) &raw const fraction, o = in(reg) &raw mut power,
            out("st(0)") _, out("st(1)") _);
        asm!("fld1", "fld qword ptr [{i}]", "fyl2x", "fstp qword ptr [{o}]",
            i = in(reg) &raw const positive, o = in(reg) &raw mut logarithm,
            out("st(0)") _, out("st(1)") _);
    }
    [sine, tangent, power, logarithm]
}

/// The flags after IMUL and SHL, from cleared ones (a CPU may leave them as they were), and the result of BSF for zero, all of them called undefined.
fn undefined_flags(of: u32) -> u64 {
    // Carry, parity, adjust, zero, sign, overflow; the rest is not of these instructions.
    const FLAGS: u64 = 0x8d5;
    let (product, shifted, found): (u64, u64, u64);
    // SAFETY: the stack is as before, and only named registers are written.
    unsafe {
        asm!("push 2", "popfq", "imul {v:e}, {v:e}", "pushfq", "pop {f}", v = inout(reg) of => _, f = out(reg) product);
        asm!("push 2", "popfq", "shl {v:e}, 7", "pushfq", "pop {f}", v = inout(reg) of => _, f = out(reg) shifted);
        asm!("bsf {r}, {z}", z = in(reg) 0_u64, r = inout(reg) u64::from(of) => found);
    }
    (product & FLAGS) | (shifted & FLAGS) << 16 | found << 32
}

/// Which bits of MXCSR exist: FXSAVE stores it.
fn mxcsr_mask() -> u32 {
    #[repr(C, align(16))]
    struct Area([u8; 512]);
    let mut area = Area([0; 512]);
    // SAFETY: FXSAVE writes 512 bytes to an aligned address.
    unsafe { asm!("fxsave [{area}]", area = in(reg) &raw mut area) };
    let mut mask = [0; 4];
    mask.copy_from_slice(&area.0[28..32]);
    u32::from_le_bytes(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_same_on_every_cpu_of_a_host_and_no_constant() {
        let here = fingerprint();
        for there in [(); 4].map(|()| std::thread::spawn(fingerprint)) {
            assert_eq!(there.join().expect("no panic"), here);
        }
        assert_ne!(mxcsr_mask(), 0);
        assert!((transcendental(0.5)[0] - 0.5_f64.sin()).abs() < 1e-15);
        assert!((transcendental(0.5)[1] - 0.5_f64.tan()).abs() < 1e-15);
        assert!((transcendental(0.5)[2] - (2.0_f64.sqrt() - 1.0)).abs() < 1e-15);
        assert!((transcendental(0.5)[3] - 0.501_f64.log2()).abs() < 1e-15);
        assert!((approximations(4.0)[1] - 0.5).abs() < 1e-3);
    }
}
