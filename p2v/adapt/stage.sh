#!/bin/sh
# The stage of the self-adaptation boot: runs in the machine's own root file system, as its first process or in a chroot of its
# initramfs, and changes what keeps it from starting on other hardware.
#
# P2V_HOME (/run/p2v) holds busybox (static), the awk programs and in/: the tables of p2v.adapt.linux and stage. It gets out/: items
# (name, status, detail), error, changes (number, path), before/N and after/N. P2V_ROOT is put before every path that is
# changed; with --files nothing is mounted, started or switched off, so that the rest can run on any tree.
#
# The first failure ends the stage: whoever started it throws the disks' overlays away.
# Functions that take a file read it from standard input, never from a pipe: in a pipe they would run in a process of their own.
# shellcheck disable=SC2015,SC2016
set -u
H=${P2V_HOME:-/run/p2v}
R=${P2V_ROOT:-}
IN=$H/in OUT=$H/out WORK=$H/work
STATE=/var/lib/p2v
KEPT=$STATE/originals
REPORT=/dev/ttyS1
COPY_MOST=262144 # bytes of a file whose text goes into the audit; of larger ones size and hash
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LC_ALL=C
export PATH LC_ALL
umask 022
booted=1
[ "${1:-}" = --files ] && booted=
rebuild_why=
number=0

bb() { "$H/busybox" "$@"; }
say() { printf 'p2v: %s\n' "$*"; }
wanted() { bb grep -qx "$1" "$IN/items"; }
result() {
    say "$1: $2: $3"
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$OUT/items"
}
die() {
    say "failed: $*"
    printf '%s\n' "$*" >"$OUT/error"
    finish
}

# --- what is changed, and what was there before ----------------------------------------------------------------------

# Called before the file $1 is changed, made or removed.
changing() {
    bb cut -f2- "$OUT/changes" | bb grep -qxF "$1" && return
    number=$((number + 1))
    printf '%s\t%s\n' "$number" "$1" >>"$OUT/changes"
    [ -f "$R$1" ] || return
    fingerprint "$R$1" >"$OUT/before/$number.sum"
    if [ "$(size "$R$1")" -le $COPY_MOST ]; then
        bb cp "$R$1" "$OUT/before/$number"
        if [ ! -e "$R$KEPT$1" ]; then
            bb mkdir -p "$R$KEPT${1%/*}" && bb cp -p "$R$1" "$R$KEPT$1" || die "the original of $1 could not be kept: $(room /var)"
        fi
    fi
}
size() { bb stat -c %s "$1"; }
fingerprint() {
    bb sha256sum "$1" | bb cut -d' ' -f1
    size "$1"
}
free_bytes() { bb stat -f -c '%a %S' "$R$1" | bb awk '{ printf "%.0f\n", $1 * $2 }'; }
room() { printf '%s KiB free on the file system of %s' "$(($(free_bytes "$1") / 1024))" "$1"; }

# Writes standard input to the file $1; says by its exit code whether that changed anything. The file itself stays (owner, mode, label).
put() {
    bb cat >"$WORK/new"
    [ -f "$R$1" ] && bb cmp -s "$WORK/new" "$R$1" && return 1
    changing "$1"
    bb mkdir -p "$R${1%/*}" && bb cat "$WORK/new" >"$R$1" || die "$1 could not be written: $(room "${1%/*}")"
    return 0
}
rename() {
    [ -f "$R$1" ] || return 1
    bb awk -v mode="$2" -v table="$IN/names" -f "$H/rename.awk" "$R$1" >"$WORK/edited" || die "$1 could not be read"
    bb awk '{ print }' "$R$1" | bb cmp -s - "$WORK/edited" && return 1
    put "$1" <"$WORK/edited"
}
remove() {
    changing "$1"
    bb rm -f "$R$1" || die "$1 could not be removed"
}

# Every file that holds a kernel command line.
loader_files() {
    for f in "$R"/etc/default/grub "$R"/etc/default/grub.d/*.cfg "$R"/etc/kernel/cmdline "$R"/etc/sysconfig/bootloader \
        "$R"/boot/grub*/grub.cfg "$R"/boot/grub*/grubenv "$R"/boot/grub/menu.lst "$R"/boot/grub/grub.conf "$R"/boot/loader/entries/*.conf \
        "$R"/efi/loader/entries/*.conf "$R"/boot/efi/loader/entries/*.conf "$R"/boot/efi/EFI/*/grub.cfg "$R"/boot/efi/EFI/*/grubenv \
        "$R"/boot/extlinux/extlinux.conf "$R"/boot/syslinux/syslinux.cfg "$R"/etc/dracut.conf "$R"/etc/dracut.conf.d/*.conf \
        "$R"/etc/initramfs-tools/conf.d/*; do
        [ -f "$f" ] && [ ! -L "$f" ] && printf '%s\n' "${f#"$R"}"
    done
}
# GRUB's environment block is 1024 bytes whatever it holds, the rest filled with '#'.
grubenv() {
    bb awk 'NR == 1 || !/^#+$/ { text = text $0 "\n" } END { printf "%s", text; for (i = length(text); i < 1024; i++) printf "#" }'
}

# --- items that are files ---------------------------------------------------------------------------------------------

item_names() {
    changed=
    rename /etc/fstab field1 && changed="$changed /etc/fstab"
    lasting_crypt >"$WORK/crypt"
    rename /etc/crypttab field2 && changed="$changed /etc/crypttab"
    lasting_crypt | bb cmp -s - "$WORK/crypt" || rebuild_why="an encrypted volume has another name now"
    loader_files >"$WORK/loaders"
    while read -r f; do
        case $f in
        */grubenv) grubenv_rename "$f" && changed="$changed $f" ;;
        *) rename "$f" words && changed="$changed $f" ;;
        esac
        case "$changed " in
        *" $f "*) case $f in /etc/initramfs-tools/conf.d/*) extra "$f" "conf/conf.d/${f##*/}" ;; esac ;;
        esac
    done <"$WORK/loaders"
    if [ -n "$changed" ]; then
        result names "done" "stable names in$changed"
    else
        result names nothing "no name depends on the order of the disks"
    fi
}
# What an initramfs may hold of crypttab: not the volumes that get a new key at each start.
lasting_crypt() { bb grep -v '/dev/u\{0,1\}random' "$R/etc/crypttab" 2>/dev/null; }
grubenv_rename() {
    bb awk -v mode=words -v table="$IN/names" -f "$H/rename.awk" "$R$1" >"$WORK/edited"
    bb awk '{ print }' "$R$1" | bb cmp -s - "$WORK/edited" && return 1
    grubenv <"$WORK/edited" >"$WORK/block"
    [ "$(size "$WORK/block")" = 1024 ] || die "$1 has no room for longer names"
    put "$1" <"$WORK/block"
}

item_device_map() {
    changed=
    for f in /boot/grub/device.map /boot/grub2/device.map; do
        if [ -f "$R$f" ] && bb grep -q '^(hd' "$R$f"; then
            remove "$f"
            changed="$changed $f"
        fi
    done
    if [ -n "$changed" ]; then
        result device-map "done" "removed$changed: GRUB looks for the disks itself"
    else
        result device-map nothing "there is none"
    fi
}

item_lvm_devices() {
    changed=
    for f in /etc/lvm/devices/system.devices /etc/lvm/cache/.cache; do
        if [ -f "$R$f" ]; then
            remove "$f"
            changed="$changed $f"
        fi
    done
    case $changed in
    *system.devices*) rebuild_why="the initramfs holds LVM's list of the source's devices" ;;
    esac
    if [ -n "$changed" ]; then
        result lvm-devices "done" "removed$changed: LVM takes every disk"
    else
        result lvm-devices nothing "LVM takes every disk"
    fi
}

item_network() {
    changed=
    links=
    for f in "$R"/lib/systemd/network/99-default.link "$R"/usr/lib/systemd/network/99-default.link; do
        [ -f "$f" ] && links=1
    done
    while read -r name mac; do
        bb cat "$R"/etc/systemd/network/*.link "$R"/etc/udev/rules.d/*net*.rules 2>/dev/null | bb grep -qi "$mac" && continue
        if [ -n "$links" ]; then
            f=/etc/systemd/network/10-p2v-$name.link
            printf '[Match]\nMACAddress=%s\nType=ether\n\n[Link]\nName=%s\n' "$mac" "$name" >"$WORK/text"
            put "$f" <"$WORK/text" && extra "$f" "${f#/}"
        else
            f=/etc/udev/rules.d/70-persistent-net.rules
            {
                [ -f "$R$f" ] && bb cat "$R$f"
                printf 'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{address}=="%s", ATTR{type}=="1", NAME="%s"\n' "$mac" "$name"
            } >"$WORK/rules"
            put "$f" <"$WORK/rules"
        fi
        changed="$changed $name=$mac"
    done <"$IN/nics"
    if [ -n "$changed" ]; then
        result network "done" "kept by address:$changed"
    else
        result network nothing "every name is bound to an address"
    fi
}

item_console() {
    changed=
    loader_files >"$WORK/loaders"
    while read -r f; do
        bb sed -e 's/\(console=ttyS\)[1-9][0-9]*/\10/g' -e 's/\(serial .*--unit=\)[1-9]/\10/' "$R$f" >"$WORK/edited"
        case $f in */grubenv) continue ;; esac
        put "$f" <"$WORK/edited" && changed="$changed $f"
    done <"$WORK/loaders"
    if [ -n "$changed" ]; then
        result console "done" "the serial console is on ttyS0 in$changed"
    else
        result console nothing "no file names another serial port"
    fi
}

esp_folder() {
    for d in /boot/efi /efi /boot /boot/esp; do
        [ -d "$R$d/EFI" ] || [ -d "$R$d/efi" ] || continue
        printf '%s\n' "$d"
        return
    done
    [ -n "$booted" ] || return
    bb mkdir -p "$H/esp"
    while read -r uuid; do
        mount -t vfat "UUID=$uuid" "$H/esp" 2>/dev/null && [ -d "$H/esp/EFI" ] && printf '%s\n' "$H/esp" && return
    done <"$IN/esp"
}
esp_loader() { # of the ESP at $1: what the boot entries name, else what a distribution installs
    while read -r f; do
        [ -f "$R$1/$f" ] && printf '%s\n' "$1/$f" && return
    done <"$IN/loaders"
    for f in shimx64.efi shim.efi systemd-bootx64.efi grubx64.efi grub.efi refind_x64.efi BOOTX64.EFI limine.efi vmlinuz.efi; do
        found=$(bb find "$R$1" -maxdepth 4 -type f -iname "$f" 2>/dev/null | bb sort | bb head -n 1)
        [ -n "$found" ] && printf '%s\n' "${found#"$R"}" && return
    done
}
item_efi_fallback() {
    esp=$(esp_folder)
    [ -n "$esp" ] || die "the EFI system partition was not found: is it in /etc/fstab?"
    for f in "$R$esp"/[Ee][Ff][Ii]/[Bb][Oo][Oo][Tt]/[Bb][Oo][Oo][Tt][Xx]64.[Ee][Ff][Ii]; do
        if [ -f "$f" ]; then
            result efi-fallback nothing "${f#"$R"} is there"
            return
        fi
    done
    loader=$(esp_loader "$esp")
    if [ -z "$loader" ]; then
        result efi-fallback nothing "there is no loader on $esp that could be copied"
        return
    fi
    for f in "$R${loader%/*}"/*; do # shim's second stage and key manager, and the file that leads GRUB to its own
        base=${f##*/}
        case $base in
        "${loader##*/}" | fb*.efi | fallback.efi) ;;
        grub*.efi | mm*.efi | MokManager.efi | grub.cfg) copy_loader "$loader" "${f#"$R"}" "$base" ;;
        esac
    done
    copy_loader "$loader" "$loader" BOOTX64.EFI
    result efi-fallback "done" "$loader is started as EFI/BOOT/BOOTX64.EFI too"
}
copy_loader() {
    case ${1##*/} in [Ss]him*) ;; *) [ "$3" = BOOTX64.EFI ] || [ "$3" = grub.cfg ] || return ;; esac
    changing "$esp/EFI/BOOT/$3"
    bb mkdir -p "$R$esp/EFI/BOOT" && bb cp "$R$2" "$R$esp/EFI/BOOT/$3" || die "$3 could not be copied: $(room "$esp")"
}

# --- initramfs --------------------------------------------------------------------------------------------------------

# A file that every initramfs gets appended, under the name $2.
extra() {
    bb mkdir -p "$WORK/extra/$(bb dirname "$2")"
    bb cp "$R$1" "$WORK/extra/$2"
}
tool() {
    for f in update-initramfs dracut mkinitcpio make-initrd; do
        for d in /usr/sbin /usr/bin /sbin /bin; do
            [ -e "$R$d/$f" ] && printf '%s\n' "$f" && return
        done
    done
}
# The wanted modules that some kernel of the machine has.
available() {
    for f in "$R"/lib/modules/*/modules.dep; do
        [ -f "$f" ] && bb awk -v show=names -f "$H/lacking.awk" "$WORK/nothing" "$IN/all-drivers" "$f"
    done | bb sort -u | bb tr '\n' ' '
}
item_configuration() {
    printf 'none\n' >"$WORK/nothing"
    configured=
    case $(tool) in
    update-initramfs)
        modules=$(bb cat "$R"/etc/initramfs-tools/initramfs.conf "$R"/etc/initramfs-tools/conf.d/* 2>/dev/null |
            bb sed -n 's/^[[:space:]]*MODULES=["'\'']\{0,1\}\([a-z]*\).*/\1/p' | bb tail -n 1)
        if [ "${modules:-most}" != most ]; then
            printf '# Drivers for any hardware, not for the present one alone.\nMODULES=most\n' >"$WORK/text"
            put /etc/initramfs-tools/conf.d/zz-p2v <"$WORK/text" && configured="/etc/initramfs-tools/conf.d/zz-p2v"
        fi
        ;;
    dracut)
        # Added whether dracut makes host-only images or not. hostonly itself stays: a generic image would not assemble LVM or RAID
        # unless the kernel's command line names them.
        printf '# Drivers for any hardware, not for the present one alone.\nadd_drivers+=" %s"\n' "$(available)" >"$WORK/text"
        put /etc/dracut.conf.d/zz-p2v.conf <"$WORK/text" && configured="/etc/dracut.conf.d/zz-p2v.conf"
        ;;
    esac
}

item_initramfs() {
    item_configuration
    note=${configured:+; $configured keeps them at the next update}
    done_to=
    left=
    bb cp "$IN/kernels" "$WORK/kernels"
    while IFS='	' read -r version image made; do
        if [ ! -f "$R$image" ]; then
            left="$left; $image is not there"
        elif [ -e "$IN/rebuild" ] || [ -n "$rebuild_why" ]; then
            rebuild "$version" "$image" "$made"
            done_to="$done_to; $version: made anew${rebuild_why:+, because $rebuild_why}"
        elif settled "$version" "$image" && [ "$(bb sed -n 2p "$R$STATE/initramfs.$version")" = drivers ]; then
            left="$left; $version was adapted before"
        elif [ ! -f "$IN/drivers.$version" ]; then
            rebuild "$version" "$image" "$made"
            done_to="$done_to; $version: made anew, what it held was not known"
        else
            lacking=$(bb awk -v show=names -f "$H/lacking.awk" "$IN/drivers.$version" "$IN/drivers" \
                "$R/lib/modules/$version/modules.dep" | bb sort | bb tr '\n' ' ')
            if [ -n "$lacking" ]; then
                add_drivers "$version" "$image"
                done_to="$done_to; $version: added ${lacking% }"
            else
                left="$left; $version lacks no driver of its kernel"
            fi
        fi
    done <"$WORK/kernels"
    detail="$done_to$left$note"
    if [ -n "$done_to$configured" ]; then
        result initramfs "done" "${detail#; }"
    else
        result initramfs nothing "${detail#; }"
    fi
}

mark() { printf '%s %s\n' "$(size "$R$1")" "$(bb tail -c 65536 "$R$1" | bb sha256sum | bb cut -c 1-64)"; }
# Notes how the image $2 of kernel $1 was left, and what it was given: drivers, or what other items wanted in it.
settle() {
    given=others
    wanted initramfs && given=drivers
    bb mkdir -p "$R$STATE" && { mark "$2" && printf '%s\n' "$given"; } >"$R$STATE/initramfs.$1"
}
settled() { [ -f "$R$STATE/initramfs.$1" ] && [ "$(bb sed -n 1p "$R$STATE/initramfs.$1")" = "$(mark "$2")" ]; }

# Appends the modules that the image $2 of kernel $1 lacks, with indexes of all that it then holds.
add_drivers() {
    from=$R/lib/modules/$1
    tree=$WORK/index.$1
    new=$WORK/add.$1
    bb mkdir -p "$tree/lib/modules/$1" "$new/lib/modules/$1"
    for show in all new; do
        bb awk -v show=$show -f "$H/lacking.awk" "$IN/drivers.$1" "$IN/drivers" "$from/modules.dep" >"$WORK/$show"
    done
    [ -s "$WORK/new" ] || die "the modules of $1 could not be listed"
    # One process a folder: an image may hold a thousand modules, and starting a process is what is slow in an emulator.
    bb awk -v from="$from/" '{ d = $0; sub("/[^/]*$", "", d); if (!(d in list)) order[++n] = d; list[d] = list[d] " " from $0 }
        END { for (i = 1; i <= n; i++) print order[i] list[order[i]] }' "$WORK/all" >"$WORK/folders"
    while read -r d files; do
        # shellcheck disable=SC2086
        bb mkdir -p "$tree/lib/modules/$1/$d" && bb ln -s $files "$tree/lib/modules/$1/$d/" || die "no room for the index of $1"
    done <"$WORK/folders"
    while read -r f; do
        bb mkdir -p "$new/lib/modules/$1/${f%/*}" && bb cp -L "$from/$f" "$new/lib/modules/$1/$f" || die "$from/$f could not be read"
    done <"$WORK/new"
    for f in modules.order modules.builtin modules.builtin.modinfo; do
        [ -f "$from/$f" ] && bb cp "$from/$f" "$tree/lib/modules/$1/"
    done
    depmod -b "$tree" "$1" 2>"$WORK/stderr" || die "depmod failed for $1: $(bb tail -n 3 "$WORK/stderr")"
    bb cp "$tree/lib/modules/$1"/modules.* "$new/lib/modules/$1/"
}

# Appends to every image what was collected for it. An archive of its own, behind zeroes up to the next 512 bytes: the kernel unpacks one
# after the other, what comes later wins. No entry named lib: it may be a symbolic link there.
append_all() {
    while IFS='	' read -r version image made; do
        [ -f "$R$image" ] || continue
        new=$WORK/add.$version
        settled "$version" "$image" && [ ! -d "$new" ] && continue
        if [ -d "$WORK/extra" ] && [ ! -e "$WORK/rebuilt.$version" ]; then
            bb mkdir -p "$new" && bb cp -r "$WORK/extra/." "$new/"
        fi
        [ -d "$new" ] || continue
        (cd "$new" && bb find . -mindepth 1 | bb sed 's,^\./,,' | bb grep -vx lib | bb sort | bb cpio -o -H newc 2>/dev/null) |
            bb gzip -6 >"$WORK/archive" || die "no archive could be made for $image"
        was=$(size "$R$image")
        pad=$(((512 - was % 512) % 512 + 512))
        more=$(size "$WORK/archive")
        [ "$(free_bytes "$(bb dirname "$image")")" -gt $((more + pad + 65536)) ] ||
            die "no room for the drivers: $((more / 1024)) KiB are needed for $image, and there are $(room "$(bb dirname "$image")")"
        changing "$image"
        { bb dd if=/dev/zero bs="$pad" count=1 2>/dev/null && bb cat "$WORK/archive"; } >>"$R$image" || die "$image could not be written"
        settle "$version" "$image"
        say "appended $more bytes to $image; truncate -s $was takes them away"
    done <"$WORK/kernels"
}

# The system's own tool makes the image $2 of kernel $1 anew.
rebuild() {
    [ -n "$booted" ] || die "no tool is run on a mere tree"
    was=$(size "$R$2")
    need=$((was * 5 / 4))
    [ "$3" = generic ] || need=$((was * 5 / 2))
    folder=$(bb dirname "$2")
    [ "$(free_bytes "$folder")" -gt $need ] ||
        die "no room for a new $2: $((need / 1024)) KiB are needed, and there are $(room "$folder")"
    before_tools
    changing "$2"
    : >"$WORK/rebuilt.$1"
    say "making $2 anew"
    [ "$(free_bytes /var)" -gt $((was * 3)) ] && bb mkdir -p "$R$KEPT$folder" && bb cp -p "$R$2" "$R$KEPT$2"
    case $(tool) in
    update-initramfs) update-initramfs -u -k "$1" >"$WORK/tool" 2>&1 </dev/null ;;
    dracut)
        present=$(bb awk -v show=names -f "$H/lacking.awk" "$WORK/nothing" "$IN/all-drivers" "/lib/modules/$1/modules.dep" | bb tr '\n' ' ')
        # rd.auto: a generic image assembles LVM and RAID only when it is told to.
        dracut --force --no-hostonly --add-drivers "$present" --kernel-cmdline rd.auto=1 "$2" "$1" >"$WORK/tool" 2>&1 </dev/null
        ;;
    mkinitcpio) mkinitcpio -k "$1" -g "$2" -S autodetect >"$WORK/tool" 2>&1 </dev/null ;;
    make-initrd) make-initrd -k "$1" >"$WORK/tool" 2>&1 </dev/null ;;
    *) die "there is no tool that could make $2 anew" ;;
    esac || die "$(tool) failed for $1: $(bb tail -n 5 "$WORK/tool" | bb tr '\n' ' ')"
    settle "$1" "$2"
}
# A tool may write anywhere: what is there before is noted where tools write text, and the time from which changes count.
before_tools() {
    [ -e "$WORK/marker" ] && return
    (cd "$R/" && bb find etc -xdev -type f -size -256k ! -name '*shadow*' | bb cpio -o -H newc 2>/dev/null) >"$WORK/etc.cpio"
    : >"$WORK/marker"
    bb sleep 1
}

# Everything that changed since the marker and was not noted by ourselves.
after_tools() {
    [ -e "$WORK/marker" ] || return
    say "looking for what the tools changed"
    for f in / /boot "$(esp_folder)" /usr /var; do
        [ -d "$f" ] || continue
        # ctime where the system's find knows it: a tool may give its files an older mtime.
        # shellcheck disable=SC2185
        if find --version 2>/dev/null | bb grep -q GNU; then finder=find newer=-cnewer; else finder="$H/busybox find" newer=-newer; fi
        # shellcheck disable=SC2086
        "$H/busybox" timeout 240 $finder "$f" -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path "$STATE" -o -path /tmp \) -prune \
            -o -type f $newer "$WORK/marker" -print 2>/dev/null
    done | bb sort -u >"$WORK/found"
    while read -r f; do
        bb cut -f2- "$OUT/changes" | bb grep -qxF "$f" && continue
        number=$((number + 1))
        printf '%s\t%s\n' "$number" "$f" >>"$OUT/changes"
        bb mkdir -p "$WORK/old"
        if (cd "$WORK/old" && bb cpio -id "${f#/}" <"$WORK/etc.cpio" 2>/dev/null) && [ -f "$WORK/old$f" ]; then
            fingerprint "$WORK/old$f" >"$OUT/before/$number.sum"
            bb cp "$WORK/old$f" "$OUT/before/$number"
        else
            : >"$OUT/before/$number.unknown"
        fi
    done <"$WORK/found"
}

# --- the frame --------------------------------------------------------------------------------------------------------

item_selinux() {
    bb grep -qs '^SELINUX=\(enforcing\|permissive\)' "$R/etc/selinux/config" || return
    [ -s "$OUT/changes" ] || return
    kind=$(bb sed -n 's/^SELINUXTYPE=//p' "$R/etc/selinux/config" | bb tail -n 1)
    contexts=/etc/selinux/$kind/contexts/files/file_contexts
    if [ -n "$booted" ] && command -v setfiles >/dev/null && [ -f "$contexts" ]; then
        bb find "$STATE" >"$WORK/label"
        bb cut -f2- "$OUT/changes" | while read -r f; do [ -e "$f" ] && printf '%s\n' "$f"; done >>"$WORK/label"
        if setfiles -F -f "$WORK/label" "$contexts" >/dev/null 2>"$WORK/stderr"; then
            result selinux "done" "labels written to what was changed"
            return
        fi
    fi
    changing /.autorelabel
    : >"$R/.autorelabel"
    result selinux "done" "/.autorelabel: the first start labels all files and restarts"
}

mount_system() {
    mount -o remount,rw / 2>"$WORK/stderr" || bb mount -o remount,rw / 2>>"$WORK/stderr" || die "the root file system cannot be written: $(bb head -n 1 "$WORK/stderr")
$(dmesg 2>/dev/null | bb grep -iE 'error|read-only|corrupt' | bb tail -n 3)"
    # Where a tool looks for the firmware it must not find that of this machine, which has BIOS.
    bb mount -t tmpfs tmpfs /sys/firmware 2>/dev/null
    wanted names && item_names
    # In a chroot of the initramfs the kernel would look for modules there, and not here.
    for f in $(bb awk '$1 !~ /^#/ { print $3 }' /etc/fstab | bb grep -xE 'ext[234]|xfs|btrfs|vfat|f2fs|jfs' | bb sort -u) \
        nls_cp437 nls_iso8859-1 nls_ascii nls_utf8; do
        modprobe -q "$f" 2>/dev/null
    done
    bb awk '$1 !~ /^#/ && NF > 2 && $2 ~ /^\/(boot|efi|usr|var|opt|boot\/.*|var\/lib|var\/tmp|usr\/.*)$/ { print length($2), $2 }' /etc/fstab |
        bb sort -n | bb cut -d' ' -f2 >"$WORK/places"
    while read -r place; do
        mounted "$place" || mount_place "$place"
    done <"$WORK/places"
    for place in / $(bb cat "$WORK/places"); do
        mounted "$place" && bb mount -o remount,rw "$place" 2>/dev/null
    done
    bb mkdir -p "$STATE" && : >"$STATE/probe" && bb rm "$STATE/probe" || die "the root file system cannot be written: $(room /)"
}
mounted() { bb awk -v place="$1" '$2 == place { found = 1 } END { exit !found }' /proc/mounts; }
mount_place() {
    mount "$1" 2>"$WORK/stderr" && return
    # The rest of LVM, without the udev that would make the nodes.
    lvm vgchange -ay --config 'activation{udev_sync=0 udev_rules=0} backup{backup=0 archive=0}' >/dev/null 2>&1
    mount "$1" 2>"$WORK/stderr" || die "$1 cannot be mounted: $(bb head -n 1 "$WORK/stderr")"
}

seal() {
    bb mkdir -p "$OUT/after"
    while IFS='	' read -r count f; do
        [ -f "$R$f" ] || continue
        fingerprint "$R$f" >"$OUT/after/$count.sum"
        [ "$(size "$R$f")" -gt $COPY_MOST ] || bb cp "$R$f" "$OUT/after/$count"
    done <"$OUT/changes"
}

finish() {
    seal
    [ -n "$booted" ] || exit 0
    say "writing the report"
    bb sync
    bb tar -C "$H" -czf "$H/report.tgz" out
    {
        echo "P2V-BEGIN"
        bb base64 "$H/report.tgz"
        echo "P2V-END $(bb sha256sum "$H/report.tgz" | bb cut -c 1-64)"
    } >"$REPORT"
    cd /
    bb awk '$2 != "/" && $2 !~ /^\/(proc|sys|dev|run)/ { print $2 }' /proc/mounts | bb sort -r | while read -r place; do
        bb umount "$place" 2>/dev/null || bb mount -o remount,ro "$place" 2>/dev/null
    done
    bb rmdir "$STATE" 2>/dev/null
    bb mount -o remount,ro / 2>/dev/null
    bb sync
    say "switching off"
    echo u >/proc/sysrq-trigger
    echo o >/proc/sysrq-trigger
    while :; do bb sleep 1; done
}

bb mkdir -p "$OUT/before" "$WORK"
: >"$OUT/items"
: >"$OUT/changes"
say "stage started"
if [ -n "$booted" ]; then
    mount_system
elif wanted names; then
    item_names
fi
wanted device-map && item_device_map
wanted lvm-devices && item_lvm_devices
wanted network && item_network
wanted console && item_console
wanted efi-fallback && item_efi_fallback
if wanted initramfs; then item_initramfs; else bb cp "$IN/kernels" "$WORK/kernels"; fi
append_all
after_tools
wanted selinux && item_selinux
finish
