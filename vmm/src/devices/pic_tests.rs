use super::*;

fn initialised(icw1: u8, icw4: u8) -> Pic {
    let mut pic = Pic::new();
    for (which, icw2, icw3) in [(Which::Master, 0x20, 4), (Which::Slave, 0x28, 2)] {
        pic.write(which, Register::Command, icw1);
        for word in [icw2, icw3, icw4, 0] {
            pic.write(which, Register::Data, word);
        }
    }
    pic
}

fn pulse(pic: &mut Pic, line: u8) {
    pic.set_line(line, true);
    pic.set_line(line, false);
}

fn end(pic: &mut Pic, which: Which) {
    pic.write(which, Register::Command, 0x20);
}

#[test]
fn masks_everything_before_initialisation() {
    let mut pic = Pic::new();
    (0..16)
        .filter(|line| *line != CASCADE)
        .for_each(|line| pulse(&mut pic, line));
    assert!(!pic.interrupt_waits());
}

#[test]
fn an_edge_is_kept_until_acknowledged_and_comes_once() {
    let mut pic = initialised(0x11, 1);
    pulse(&mut pic, 4);
    assert!(pic.interrupt_waits());
    assert_eq!(pic.acknowledge(), 0x24);
    assert!(!pic.interrupt_waits());
    end(&mut pic, Which::Master);
    assert!(!pic.interrupt_waits());
}

#[test]
fn a_line_that_stays_high_is_one_edge() {
    let mut pic = initialised(0x11, 1);
    pic.set_line(5, true);
    assert_eq!(pic.acknowledge(), 0x25);
    end(&mut pic, Which::Master);
    pic.set_line(5, true);
    assert!(!pic.interrupt_waits());
    pic.set_line(5, false);
    pic.set_line(5, true);
    assert_eq!(pic.acknowledge(), 0x25);
}

#[test]
fn a_level_comes_again_until_it_falls() {
    let mut pic = initialised(0x11, 1);
    pic.write(Which::Slave, Register::Trigger, 0xff);
    assert_eq!(pic.read(Which::Slave, Register::Trigger), 0b1101_1110);
    pic.set_line(10, true);
    assert_eq!(pic.acknowledge(), 0x2a);
    end(&mut pic, Which::Slave);
    end(&mut pic, Which::Master);
    assert_eq!(pic.acknowledge(), 0x2a);
    pic.set_line(10, false);
    end(&mut pic, Which::Slave);
    end(&mut pic, Which::Master);
    assert!(!pic.interrupt_waits());
}

#[test]
fn icw1_can_make_all_lines_levels() {
    let mut pic = initialised(0x19, 1);
    pulse(&mut pic, 1);
    assert!(!pic.interrupt_waits());
    pic.set_line(1, true);
    assert!(pic.interrupt_waits());
}

#[test]
fn the_lower_line_is_more_urgent_and_interrupts_the_higher() {
    let mut pic = initialised(0x11, 1);
    pulse(&mut pic, 5);
    assert_eq!(pic.acknowledge(), 0x25);
    pulse(&mut pic, 6);
    assert!(!pic.interrupt_waits(), "less urgent than the one served");
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x21);
    // The unspecific end is for the most urgent one.
    end(&mut pic, Which::Master);
    assert!(!pic.interrupt_waits());
    end(&mut pic, Which::Master);
    assert_eq!(pic.acknowledge(), 0x26);
}

#[test]
fn a_specific_end_names_its_line() {
    let mut pic = initialised(0x11, 1);
    pulse(&mut pic, 5);
    pic.acknowledge();
    pulse(&mut pic, 1);
    pic.acknowledge();
    pic.write(Which::Master, Register::Command, 0x60 | 5);
    pic.write(Which::Master, Register::Command, 0x0b);
    assert_eq!(pic.read(Which::Master, Register::Command), 1 << 1);
}

#[test]
fn a_mask_holds_back_and_keeps() {
    let mut pic = initialised(0x11, 1);
    pic.write(Which::Master, Register::Data, 1 << 3);
    assert_eq!(pic.read(Which::Master, Register::Data), 1 << 3);
    pulse(&mut pic, 3);
    assert!(!pic.interrupt_waits());
    pic.write(Which::Master, Register::Command, 0x0a);
    assert_eq!(pic.read(Which::Master, Register::Command), 1 << 3);
    pic.write(Which::Master, Register::Data, 0);
    assert_eq!(pic.acknowledge(), 0x23);
}

#[test]
fn the_slave_speaks_through_line_two() {
    let mut pic = initialised(0x11, 1);
    pulse(&mut pic, 14);
    assert_eq!(pic.read(Which::Master, Register::Command), 1 << 2);
    assert_eq!(pic.acknowledge(), 0x2e);
    // More urgent at the slave, but line 2 is being served.
    pulse(&mut pic, 10);
    assert!(!pic.interrupt_waits());
    // More urgent at the master.
    pulse(&mut pic, 0);
    assert_eq!(pic.acknowledge(), 0x20);
    end(&mut pic, Which::Master);
    end(&mut pic, Which::Slave);
    assert!(!pic.interrupt_waits());
    end(&mut pic, Which::Master);
    assert_eq!(pic.acknowledge(), 0x2a);
}

#[test]
fn a_masked_cascade_silences_the_slave() {
    let mut pic = initialised(0x11, 1);
    pic.write(Which::Master, Register::Data, 1 << 2);
    pulse(&mut pic, 8);
    assert!(!pic.interrupt_waits());
}

#[test]
fn the_special_fully_nested_mode_lets_the_slave_interrupt_itself() {
    let mut pic = initialised(0x11, 0x11);
    pulse(&mut pic, 14);
    assert_eq!(pic.acknowledge(), 0x2e);
    pulse(&mut pic, 10);
    assert_eq!(pic.acknowledge(), 0x2a);
    pulse(&mut pic, 15);
    assert!(!pic.interrupt_waits());
}

#[test]
fn without_a_request_the_spurious_vector_comes_and_nothing_is_in_service() {
    let mut pic = initialised(0x11, 1);
    assert_eq!(pic.acknowledge(), 0x27);
    pic.write(Which::Master, Register::Command, 0x0b);
    assert_eq!(pic.read(Which::Master, Register::Command), 0);
}

#[test]
fn an_automatic_end_needs_no_end() {
    let mut pic = initialised(0x11, 3);
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x24);
    pulse(&mut pic, 5);
    assert_eq!(pic.acknowledge(), 0x25);
    pic.write(Which::Master, Register::Command, 0x0b);
    assert_eq!(pic.read(Which::Master, Register::Command), 0);
}

#[test]
fn rotation_makes_the_served_line_the_least_urgent() {
    let mut pic = initialised(0x11, 1);
    pulse(&mut pic, 1);
    pic.acknowledge();
    pic.write(Which::Master, Register::Command, 0xa0);
    pulse(&mut pic, 1);
    pulse(&mut pic, 6);
    assert_eq!(pic.acknowledge(), 0x26);
    end(&mut pic, Which::Master);
    // Set priority: line 5 least urgent, so 6 is the most.
    pic.write(Which::Master, Register::Command, 0xc0 | 5);
    pulse(&mut pic, 6);
    assert_eq!(pic.acknowledge(), 0x26);
}

#[test]
fn the_special_mask_mode_lets_less_urgent_lines_through() {
    let mut pic = initialised(0x11, 1);
    pulse(&mut pic, 3);
    pic.acknowledge();
    pulse(&mut pic, 6);
    assert!(!pic.interrupt_waits());
    pic.write(Which::Master, Register::Data, 1 << 3);
    pic.write(Which::Master, Register::Command, 0x68);
    assert_eq!(pic.acknowledge(), 0x26);
}

#[test]
fn a_poll_acknowledges() {
    let mut pic = initialised(0x11, 1);
    pulse(&mut pic, 6);
    pic.write(Which::Master, Register::Command, 0x0c);
    assert_eq!(pic.read(Which::Master, Register::Command), 0x86);
    assert!(!pic.interrupt_waits());
    pic.write(Which::Master, Register::Command, 0x0c);
    assert_eq!(pic.read(Which::Master, Register::Command), 7);
}

#[test]
fn initialisation_forgets_edges_and_the_mask() {
    let mut pic = initialised(0x11, 1);
    pic.write(Which::Master, Register::Data, 0xff);
    pulse(&mut pic, 4);
    pic.write(Which::Master, Register::Command, 0x11);
    for word in [0x40, 4, 1] {
        pic.write(Which::Master, Register::Data, word);
    }
    assert_eq!(pic.read(Which::Master, Register::Data), 0);
    assert!(!pic.interrupt_waits());
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x44);
}
