//! Compiling one plain loop for several instruction sets.

/// Defines `fn $name(args)` that runs `$body::<FMA>(args)` compiled for the best instruction set of the processor.
///
/// The body is plain Rust marked `#[inline(always)]` and generic over `const FMA: bool`, which says whether fused
/// multiply-add is an instruction there; the compiler vectorises it. After `lanes`, it is generic over the instruction set's
/// [`Lanes`](super::lanes::Lanes) instead. A type parameter of the function is the body's second.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident$(<$t:ident: $bound:ident>)?($($arg:ident : $ty:ty),* $(,)?) => lanes $body:ident) => {
        $crate::kernels::cpu::dispatch::dispatch! {
            @ [$(#[$doc])*] [$vis] $name [$(<$t: $bound>)?] [$($t)?] ($($arg: $ty),*) $body
            [$crate::kernels::cpu::lanes::Avx512]
            [$crate::kernels::cpu::lanes::Avx2]
            [$crate::kernels::cpu::lanes::Plain]
        }
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident$(<$t:ident: $bound:ident>)?($($arg:ident : $ty:ty),* $(,)?) => $body:ident) => {
        $crate::kernels::cpu::dispatch::dispatch! {
            @ [$(#[$doc])*] [$vis] $name [$(<$t: $bound>)?] [$($t)?] ($($arg: $ty),*) $body [true] [true] [false]
        }
    };
    (
        @ [$($doc:tt)*] [$vis:vis] $name:ident [$($generics:tt)*] [$($t:ident)?] ($($arg:ident : $ty:ty),*) $body:ident
        [$($avx512:tt)*] [$($avx2:tt)*] [$($portable:tt)*]
    ) => {
        $($doc)*
        $vis fn $name$($generics)*(isa: $crate::kernels::cpu::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                fn avx512$($generics)*($($arg: $ty),*) {
                    $body::<$($avx512)* $(, $t)?>($($arg),*);
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2$($generics)*($($arg: $ty),*) {
                    $body::<$($avx2)* $(, $t)?>($($arg),*);
                }
                match isa {
                    $crate::kernels::cpu::Isa::Avx512
                    | $crate::kernels::cpu::Isa::Avx512Vnni
                    | $crate::kernels::cpu::Isa::Avx512Bf16 => {
                        // SAFETY: `Isa` values above `Portable` come from detecting the features.
                        #[expect(unsafe_code, reason = "calls code compiled for detected features")]
                        return unsafe { avx512($($arg),*) };
                    }
                    $crate::kernels::cpu::Isa::Avx2 => {
                        // SAFETY: as above.
                        #[expect(unsafe_code, reason = "calls code compiled for detected features")]
                        return unsafe { avx2($($arg),*) };
                    }
                    $crate::kernels::cpu::Isa::Portable => {}
                }
            }
            let _ = isa;
            $body::<$($portable)* $(, $t)?>($($arg),*);
        }
    };
}

/// `a * b + c`, fused where that is one instruction.
#[inline(always)]
pub(super) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

pub(super) use dispatch;
