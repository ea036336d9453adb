#!/bin/sh
# Starts the virtual machine in QEMU. Usage: ./metal1.sh [further QEMU arguments]
# p2v-definition: {"version":1,"name":"metal1","uuid":"4c4c4544-0042-3510-8054-b4c04f4d3132","architecture":"x86_64","sockets":1,"cores":2,"threads":2,"memory":4294660096,"clock_utc":true,"macs":["52:54:00:a1:00:01",""],"disks":[{"file":"metal1-data.qcow2","format":"qcow2","size":1073741824,"logical_sector":512,"boot":false,"disk_id":"wwn-2","serial":""},{"file":"metal1.qcow2","format":"qcow2","size":6442450944,"logical_sector":512,"boot":true,"disk_id":"wwn-1","serial":"P2VSRC0001"}],"bus":"sata","nic":"e1000","firmware":"bios","secure_boot":null,"machine":"","video":"","network":"","nvram":""}
set -eu
cd -- "$(dirname -- "$0")"

# KVM where this user may use it, else plain emulation. ACCEL=tcg or ACCEL=kvm overrules.
if [ -z "${ACCEL:-}" ]; then
    if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then ACCEL=kvm; else ACCEL=tcg; fi
fi
if [ "$ACCEL" = kvm ]; then CPU=${CPU:-host}; else CPU=${CPU:-max}; fi

# Each card's other end: NETWORK=bridge,br=br0 is a bridge, NETWORK=user,restrict=on cuts it off.
NETWORK=${NETWORK:-user}

# Without a graphical session the machine's serial console is this terminal (Ctrl-A X ends it).
if [ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then
    set -- -display none -serial mon:stdio "$@"
else
    set -- -serial vc "$@"
fi

exec "${QEMU:-qemu-system-x86_64}" \
    -name guest=metal1 \
    -machine q35 -accel "$ACCEL" -cpu "$CPU" \
    -smp 4,sockets=1,cores=2,threads=2 \
    -m 4096 \
    -uuid 4c4c4544-0042-3510-8054-b4c04f4d3132 \
    -rtc base=utc \
    -nodefaults -vga std \
    -drive if=none,id=disk0,format=qcow2,discard=unmap,detect-zeroes=unmap,file=./metal1-data.qcow2 \
    -device ide-hd,bus=ide.0,drive=disk0 \
    -drive if=none,id=disk1,format=qcow2,discard=unmap,detect-zeroes=unmap,file=./metal1.qcow2 \
    -device ide-hd,bus=ide.1,drive=disk1,serial=P2VSRC0001,bootindex=1 \
    -nic "$NETWORK,model=e1000,mac=52:54:00:a1:00:01" \
    -nic "$NETWORK,model=e1000" \
    "$@"
