#!/bin/sh
# Starts the virtual machine in QEMU. Usage: ./B-ro-Server-alt.sh [further QEMU arguments]
# p2v-definition: {"version":1,"name":"B\u00fcro-Server (alt)","uuid":"","architecture":"x86_64","sockets":2,"cores":4,"threads":1,"memory":17179869184,"clock_utc":false,"macs":["3c:ec:ef:00:11:22"],"disks":[{"file":"metal1-data.qcow2","format":"qcow2","size":1073741824,"logical_sector":512,"boot":false,"disk_id":"wwn-2","serial":""},{"file":"metal1.qcow2","format":"qcow2","size":6442450944,"logical_sector":512,"boot":true,"disk_id":"wwn-1","serial":"P2VSRC0001"}],"bus":"virtio","nic":"virtio-net-pci","firmware":"uefi","secure_boot":null,"machine":"","video":"","network":"","nvram":""}
set -eu
cd -- "$(dirname -- "$0")"

# KVM where this user may use it, else plain emulation. ACCEL=tcg or ACCEL=kvm overrules.
if [ -z "${ACCEL:-}" ]; then
    if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then ACCEL=kvm; else ACCEL=tcg; fi
fi
if [ "$ACCEL" = kvm ]; then CPU=${CPU:-host}; else CPU=${CPU:-max}; fi

nvram=./B-ro-Server-alt.nvram.fd
# UEFI: the firmware's code comes from the distribution; the machine's variables are kept in a copy beside this script.
# OVMF_CODE and OVMF_VARS, set together, overrule what is found.
if [ -z "${OVMF_CODE:-}" ]; then
    for pair in /usr/share/OVMF/OVMF_CODE_4M.fd:/usr/share/OVMF/OVMF_VARS_4M.fd \
        /usr/share/OVMF/OVMF_CODE.fd:/usr/share/OVMF/OVMF_VARS.fd \
        /usr/share/edk2/ovmf/OVMF_CODE.fd:/usr/share/edk2/ovmf/OVMF_VARS.fd \
        /usr/share/edk2/x64/OVMF_CODE.4m.fd:/usr/share/edk2/x64/OVMF_VARS.4m.fd \
        /usr/share/qemu/ovmf-x86_64-code.bin:/usr/share/qemu/ovmf-x86_64-vars.bin; do
        OVMF_CODE=${pair%%:*}
        OVMF_VARS=${pair#*:}
        [ -r "$OVMF_CODE" ] && [ -r "$OVMF_VARS" ] && break
        OVMF_CODE=""
    done
fi
if [ -z "$OVMF_CODE" ]; then
    echo "no UEFI firmware found: install the package ovmf (edk2-ovmf), or set OVMF_CODE and OVMF_VARS" >&2
    exit 1
fi
[ -e "$nvram" ] || cp -- "$OVMF_VARS" "$nvram"

# Each card's other end: NETWORK=bridge,br=br0 is a bridge, NETWORK=user,restrict=on cuts it off.
NETWORK=${NETWORK:-user}

# Without a graphical session the machine's serial console is this terminal (Ctrl-A X ends it).
if [ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then
    set -- -display none -serial mon:stdio "$@"
else
    set -- -serial vc "$@"
fi

set -- -drive if=pflash,format=raw,unit=1,file=./B-ro-Server-alt.nvram.fd "$@"
set -- -drive "if=pflash,format=raw,unit=0,readonly=on,file=$OVMF_CODE" "$@"

exec "${QEMU:-qemu-system-x86_64}" \
    -name 'guest=Büro-Server (alt)' \
    -machine q35 -accel "$ACCEL" -cpu "$CPU" \
    -smp 8,sockets=2,cores=4,threads=1 \
    -m 16384 \
    -rtc base=localtime \
    -nodefaults -vga std \
    -drive if=none,id=disk0,format=qcow2,discard=unmap,detect-zeroes=unmap,file=./metal1-data.qcow2 \
    -device virtio-blk-pci,drive=disk0 \
    -drive if=none,id=disk1,format=qcow2,discard=unmap,detect-zeroes=unmap,file=./metal1.qcow2 \
    -device virtio-blk-pci,drive=disk1,serial=P2VSRC0001,bootindex=1 \
    -nic "$NETWORK,model=virtio-net-pci,mac=3c:ec:ef:00:11:22" \
    "$@"
