#!/usr/bin/env bash
# Runs a test binary on an emulated processor that has AVX-512, whatever this machine has.
#
#   tools/emulate.sh BINARY [ARGUMENT...]
#
# Boots a kernel in Bochs with nothing but busybox and the binary with its libraries; the output is what the machine's
# serial port shows, the exit status the binary's. tools/README.md says how to build Bochs and which packages hold the
# rest. FEATURES are added to a Skylake-X (default none); PROPTEST_CASES and RAYON_NUM_THREADS are passed on.
# Where the parts lie, if not where Debian puts them: BOCHS, KERNEL, BUSYBOX, BIOS, VGABIOS, ISOLINUX, SYSLINUX, XORRISO.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,10p' "$0" >&2; exit 2; }
binary=$1
shift
bochs=${BOCHS:-bochs}
kernel=${KERNEL:-$(ls /boot/vmlinuz-* 2>/dev/null | tail -n 1)}
busybox=${BUSYBOX:-/bin/busybox}
bios=${BIOS:-/usr/share/bochs/BIOS-bochs-latest}
vgabios=${VGABIOS:-/usr/share/vgabios/vgabios.bin}
isolinux=${ISOLINUX:-/usr/lib/ISOLINUX/isolinux.bin}
syslinux=${SYSLINUX:-/usr/lib/syslinux/modules/bios/ldlinux.c32}
for file in "$binary" "$kernel" "$busybox" "$bios" "$vgabios" "$isolinux" "$syslinux"; do
    [ -r "$file" ] || { echo "no such file: '$file'" >&2; exit 2; }
done

work=$(mktemp -d)
emulator=
clean_up() {
    [ -z "$emulator" ] || { kill -9 "$emulator" && wait "$emulator"; } 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT

# The machine's files: the binary and the libraries it names.
root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp} "$work/disc/isolinux"
cp "$busybox" "$root/bin/busybox"
strip -o "$root/bin/test" "$binary"
ldd "$binary" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
done || true
{
    echo '#!/bin/busybox sh'
    echo '/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t sysfs sys /sys'
    echo '/bin/busybox mount -t devtmpfs dev /dev; exec </dev/null >/dev/ttyS0 2>&1; cd /tmp'
    for name in PROPTEST_CASES RAYON_NUM_THREADS; do
        [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    echo '/bin/busybox grep -m 1 ^flags /proc/cpuinfo | /bin/busybox tr " " "\n" | /bin/busybox grep avx | /bin/busybox xargs'
    printf '/bin/test'
    [ $# -eq 0 ] || printf ' %q' "$@"
    echo '; echo "emulated exit status $?"; /bin/busybox sleep 3600'
} > "$root/init"
chmod +x "$root/init"

# A disc that boots it.
(cd "$root" && find . | "$busybox" cpio -o -H newc 2>/dev/null) | gzip -1 > "$work/disc/initrd"
cp "$kernel" "$work/disc/linux"
cp "$isolinux" "$syslinux" "$work/disc/isolinux/"
cat > "$work/disc/isolinux/isolinux.cfg" <<CONFIG
DEFAULT linux
PROMPT 0
LABEL linux
KERNEL /linux
INITRD /initrd
APPEND console=ttyS0 quiet loglevel=2 panic=-1 mitigations=off nokaslr rdinit=/init
CONFIG
"${XORRISO:-xorriso}" -as mkisofs -quiet -o "$work/disc.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
    -no-emul-boot -boot-load-size 4 -boot-info-table "$work/disc" 2>/dev/null

features=''
[ -z "${FEATURES:-}" ] || features="add_features=\"$FEATURES\", "
cat > "$work/bochsrc" <<CONFIG
cpu: model=corei7_skylake_x, ${features}ips=100000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=$bios, options=fastboot
vgaromimage: file=$vgabios
boot: cdrom
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$work/disc.iso, status=inserted
com1: enabled=1, mode=file, dev=$work/serial
log: $work/log
panic: action=fatal
error: action=ignore
info: action=ignore
display_library: nogui
clock: sync=none
CONFIG
touch "$work/serial" "$work/log"
# A session of its own: Bochs would stop when it touches the terminal.
setsid "$bochs" -q -f "$work/bochsrc" > "$work/stdout" 2>&1 < /dev/null &
emulator=$!
status=
while read -r line; do
    line=${line%$'\r'}
    case $line in
        "emulated exit status "*) status=${line##* }; break ;;
        *) printf '%s\n' "$line" ;;
    esac
done < <(tail -n +1 -f --pid="$emulator" "$work/serial")
[ -n "$status" ] || { echo "the machine stopped:" >&2; tail -n 20 "$work/stdout" "$work/log" >&2; exit 1; }
exit "$status"
